"""Files of weights: finding, reading without executing anything, checking, naming by content."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

SHOWN = 4  # keys of one kind that an error names


def weights_file(spec: str | Path) -> Path:
    """The file ``spec`` names: a local path, or ``org/repo:file`` of the model hub.

    Raises:
        OSError: no such local file, or the hub does not give it.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    repo, _, name = str(spec).partition(":")
    if not name or repo.count("/") != 1:
        raise FileNotFoundError(
            f"no file of weights {str(spec)!r}; give a local path or 'org/repo:file' of the hub"
        )
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a torch file that holds nothing but tensors.

    A checkpoint of the form ``{"state_dict": {...}}`` gives the inner one.

    Raises:
        ValueError: the file holds something else than named tensors, or is damaged.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):  # they say themselves what is wrong
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and nothing else is read from a file of weights; "
            f"convert it to safetensors where it comes from. {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # readers of damaged files raise nearly anything
        raise ValueError(
            f"{path} is no file of weights, or a damaged one of {path.stat().st_size:,} bytes; "
            f"fetch it again. {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return dict(state)


def check_keys(faults: Mapping[str, Sequence[str]], source: str | Path) -> None:
    """Refuse weights with ``faults``, ``{kind: names}``.

    Raises:
        ValueError: any kind has a name; the message gives the first few of each and their number.
    """
    said = [f"{kind}: {_listed(names)}" for kind, names in faults.items() if names]
    if said:
        raise ValueError(
            f"the weights in {str(source)!r} do not fit the network. {'; '.join(said)}"
        )


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load ``state`` into ``module``; every key has to be there, known and of the right shape.

    Raises:
        ValueError: names the keys that are missing, unknown or of another shape.
    """
    have = module.state_dict()
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(have[k].shape)}"
        for k in sorted(have.keys() & state.keys())
        if state[k].shape != have[k].shape
    ]
    faults = {
        "missing": sorted(have.keys() - state.keys()),
        "unknown": sorted(state.keys() - have.keys()),
        "wrong shape": shapes,
    }
    check_keys(faults, source)
    module.load_state_dict(dict(state))


def digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Twelve hexadecimal digits of the SHA-256 over names, shapes and values."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:12]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
