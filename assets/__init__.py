"""Data that ships with the suite; found through :func:`mmalign.assets.asset`."""
