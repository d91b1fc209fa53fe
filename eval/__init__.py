"""Evaluation: harness, benchmarks, statistics and reports. Always ``from eval.x import y``."""
