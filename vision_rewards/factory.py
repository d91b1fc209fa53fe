"""From what a user writes to a reward model; listing imports nothing heavy."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmalign.registry import REWARDS, Entry, unknown

if TYPE_CHECKING:
    from mmalign.protocols import RewardModel

Loadable = Any  # a name, {name: weight}, a RewardModel, a function, or a list of these


def list_rewards() -> list[Entry]:
    """Name, target and one-line summary of every registered reward, by name."""
    return list(REWARDS)


def load_reward(spec: Loadable) -> RewardModel:
    """Make a reward model of ``spec``.

    Args:
        spec: one of

            * a registered name, e.g. ``"shapes_partial"``;
            * ``"path/to/file.py:name"`` or ``"package.module:name"``: the user's own function,
              reward model, or class of reward models. The file is executed;
            * a reward model (returned as it is) or a function ``fn(images, prompts[, context])``;
            * ``{name: weight}``, or ``{label: (spec, weight)}``: a weighted sum;
            * a list of the above: a sum in which each weighs 1.

    Raises:
        UnknownNameError: a name that is not registered or not in the file; names the nearest.
        ValueError: an empty or malformed composition, or an unusable weight.
        FileNotFoundError: the file of a ``"file.py:name"`` does not exist.
        TypeError: ``spec`` is none of the above.
    """
    from mmalign.protocols import RewardModel

    if isinstance(spec, str):
        return _from_name(spec)
    if isinstance(spec, Mapping):
        return _weighted(spec)
    if isinstance(spec, Sequence):
        return _summed(spec)
    return _from_object(spec, repr(spec), RewardModel)


def _from_name(name: str) -> RewardModel:
    from mmalign.protocols import RewardModel

    if name in REWARDS or ":" not in name:
        return _from_object(REWARDS.load(name), name, RewardModel)
    where, _, attribute = name.rpartition(":")
    module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    if not hasattr(module, attribute):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown(f"reward in {where!r}", attribute, public)
    return _from_object(getattr(module, attribute), name, RewardModel)


def _from_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"reward file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"_user_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # true of every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_object(found: Any, said: str, protocol: type) -> RewardModel:
    """``found`` itself, an instance of it, or a wrapper around it."""
    if isinstance(found, type):  # before the protocol: a class has the protocol's names as well
        found = found()
        if not isinstance(found, protocol):
            raise TypeError(f"{said} is a class, but not of reward models: see RewardModel")
    if isinstance(found, protocol):
        return cast("RewardModel", found)
    if callable(found):
        from vision_rewards.function import FunctionReward

        return FunctionReward(cast("Callable[..., Any]", found))
    raise TypeError(
        f"cannot make a reward of {said} ({type(found).__name__}): give a registered name, "
        "'file.py:function', {name: weight}, a reward model, a function, or a list of these"
    )


def _weighted(spec: Mapping[Any, Any]) -> RewardModel:
    from vision_rewards.compose import WeightedSum

    components: dict[str, tuple[RewardModel, float]] = {}
    for name, given in spec.items():
        part, weight = given if isinstance(given, (tuple, list)) else (name, given)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"the weight of {name!r} must be a number, got {weight!r}")
        components[str(name)] = (load_reward(part), float(weight))
    return WeightedSum(components)


def _summed(spec: Sequence[Any]) -> RewardModel:
    from vision_rewards.compose import WeightedSum

    rewards = [load_reward(part) for part in spec]
    names = [reward.info.name for reward in rewards]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"reward {twice[0]!r} is listed more than once; name them apart with "
            "{label: (reward, weight)}"
        )
    if len(rewards) == 1:
        return rewards[0]
    return WeightedSum({n: (r, 1.0) for n, r in zip(names, rewards, strict=True)})
