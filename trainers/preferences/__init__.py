"""Preference optimisation: pairs from files or from rollouts, and what is learned from them."""
