"""People compare pictures in a browser; their decisions become a file of labels."""
