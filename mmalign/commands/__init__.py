"""What each ``mmalign`` command does; one module a command, imported when it runs."""
