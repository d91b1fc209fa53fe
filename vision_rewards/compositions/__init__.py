"""Rewards made of rewards; :mod:`vision_rewards.compose` is what to import."""
