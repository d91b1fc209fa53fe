"""Reward models for images and videos; usable on their own, without the rest of the suite."""
