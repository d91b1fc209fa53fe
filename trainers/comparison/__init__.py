"""The comparison of training methods at equal compute."""
