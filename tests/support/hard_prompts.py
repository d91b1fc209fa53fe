"""Prompts that the shipped generator often misses: what steering is for.

Few enough to be quick, enough that a gain is more than the luck of some noises.
"""

from __future__ import annotations

from mmalign.shapes import prompts

HARD = [
    p
    for task in ("counting", "position", "color_attr", "two_object")
    for p in prompts("test", task, 3)
]
