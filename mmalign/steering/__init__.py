"""Steering: better samples at inference time, no weights touched."""

from mmalign.steering.best_of_n import BestOfN

__all__ = ["BestOfN"]
