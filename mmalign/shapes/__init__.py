"""The shapes world: an endlessly renderable picture world with exact ground truth."""

from mmalign.shapes.grammar import (
    COLORS,
    RELATIONS,
    SHAPES,
    TASKS,
    CaptionError,
    ObjectSpec,
    PromptSpec,
    caption,
    parse,
)
from mmalign.shapes.render import render, render_layout
from mmalign.shapes.scene import Placed, Scene, sample_scene
from mmalign.shapes.splits import prompts, sample_spec, split_of

__all__ = [
    "COLORS",
    "RELATIONS",
    "SHAPES",
    "TASKS",
    "CaptionError",
    "ObjectSpec",
    "Placed",
    "PromptSpec",
    "Scene",
    "caption",
    "parse",
    "prompts",
    "render",
    "render_layout",
    "sample_scene",
    "sample_spec",
    "split_of",
]
