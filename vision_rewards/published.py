"""Published checkpoints of large networks: found, renamed, and put in place without a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from vision_rewards.weights import check_keys, weights_file


def find_weights(checkpoint: str | Path | None, hub: str, file: str) -> Path:
    """The weights file of a scorer.

    Args:
        checkpoint: a local file, a local folder that holds ``file`` (or its ``.safetensors``
            form), a hub name ``org/name`` or ``org/name:file``; ``None`` means ``hub``.
        hub: the repository of the published weights.
        file: the name of the published file.

    Raises:
        OSError: there is no such file, or the hub does not give it.
    """
    path = Path(checkpoint or hub).expanduser()
    if path.is_dir():
        names = (file, Path(file).with_suffix(".safetensors").name)
        found = next((path / n for n in names if (path / n).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"folder {str(path)!r} holds no {' or '.join(names)}")
        return found
    spec = str(checkpoint or hub)
    bare = spec.count("/") == 1 and ":" not in spec and not path.is_file()
    return weights_file(f"{spec}:{file}" if bare else spec)


def rename_weights(
    state: Mapping[str, Tensor], rename: Callable[[str], str | None], unused: Iterable[str] = ()
) -> dict[str, Tensor]:
    """``state`` under the names of our network.

    Args:
        state: published names and tensors.
        rename: a published name to ours. ``None`` for a name it does not know, which is kept as
            it is, so that loading complains about it.
        unused: prefixes of published names that the network has no use for.
    """
    skip = tuple(unused)
    return {rename(n) or n: t for n, t in state.items() if not (skip and n.startswith(skip))}


def fill(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Make ``state`` the parameters of a network that was built on the meta device.

    Raises:
        ValueError: names the keys that are missing, unknown or of another shape.
    """
    wanted = network.state_dict()
    shapes = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(wanted[n].shape)}"
        for n in sorted(wanted.keys() & state.keys())
        if state[n].shape != wanted[n].shape
    ]
    faults = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "wrong shape": shapes,
    }
    check_keys(faults, source)
    network.load_state_dict(dict(state), assign=True)


def text_digest(text: str) -> str:
    """Twelve hexadecimal digits that identify a text, for templates and vocabularies."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
