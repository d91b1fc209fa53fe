"""The comparison of steering methods against compute."""
