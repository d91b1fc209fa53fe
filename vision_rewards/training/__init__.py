"""Training of reward models from labels on disk; see docs/train-reward.md."""
