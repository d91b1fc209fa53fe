"""Training: one loop, advantages, and one readable file per objective."""
