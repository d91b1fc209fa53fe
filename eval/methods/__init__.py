"""The comparison of training methods: curves, claims decided by intervals, one page."""
