"""Random heads on embeddings under the names of the published files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLACES = {
    "linear": ("layers.", (0, 2, 4, 6, 7)),
    "relu": ("layers.", (0, 3, 6, 9, 11)),
    "v2_5": ("scoring_head.", (0, 2, 4, 6, 8)),
}


def head_state(kind: str, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """A random head under the published key names."""
    torch.manual_seed(6)
    if kind == "v1":
        return nn.Linear(widths[0], 1).state_dict()
    prefix, places = PLACES[kind]
    state = {}
    for place, a, b in zip(places, widths[:-1], widths[1:], strict=True):
        layer = nn.Linear(a, b)
        state[f"{prefix}{place}.weight"] = layer.weight.detach()
        state[f"{prefix}{place}.bias"] = layer.bias.detach()
    return state


def nsfw_state(widths: tuple[int, ...]) -> dict[str, Tensor]:
    """A random head under the key names of the converted LAION detector."""
    torch.manual_seed(9)
    state = {"norm.mean": torch.randn(widths[0]), "norm.variance": torch.rand(widths[0]) + 0.1}
    for k in range(1, len(widths)):
        layer = nn.Linear(widths[k - 1], widths[k])
        state[f"linear_{k}.weight"] = layer.weight.detach()
        state[f"linear_{k}.bias"] = layer.bias.detach()
    return state
