"""What runs the rest: devices, seeds, logs, files on disk, provenance."""
