"""From what a user writes to a reward model; listing imports nothing heavy."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmalign.assets import asset
from mmalign.registry import REWARDS, Entry, unknown

if TYPE_CHECKING:
    from mmalign.protocols import RewardModel

SHIPPED = "shipped:"
Loadable = Any  # a name, {name: weight}, a RewardModel, a function, or a list of these


def list_rewards() -> list[Entry]:
    """Name, target and one-line summary of every registered reward, by name."""
    return list(REWARDS)


def load_reward(spec: Loadable) -> RewardModel:
    """Make a reward model of ``spec``.

    Args:
        spec: one of

            * a registered name, e.g. ``"shapes_partial"``, and ``"name@checkpoint"`` for other
              weights than the published ones (``shipped:shapes-clip`` is one of the assets);
            * several with weights: ``"pickscore + 0.5*shapes_partial"``;
            * ``"path/to/file.py:name"`` or ``"package.module:name"``: the user's own function,
              reward model, or class of reward models. The file is executed;
            * a folder with ``reward.json``: a reward model made by ``mmalign train-reward``;
            * ``"remote:http://host:port"``: a reward server, or several with commas between;
            * ``{"reward": name, "checkpoint": ..., option: value}``: with options;
            * ``{"compose": kind, "parts": ..., option: value}``: a composition;
            * ``{name: weight}``, ``{label: (spec, weight)}`` or ``{label: {"reward": ...,
              "weight": ...}}``: a weighted sum;
            * a list of the above: a sum in which each weighs 1;
            * a reward model (returned as it is) or a function ``fn(images, prompts[, context])``.

    Raises:
        UnknownNameError: an unknown name or option; names the nearest.
        ValueError: an empty or malformed composition, or an unusable weight.
        FileNotFoundError: the file of a ``"file.py:name"`` does not exist.
        TypeError: ``spec`` is none of the above.
    """
    from mmalign.protocols import RewardModel

    if isinstance(spec, str):
        return _from_text(spec)
    if isinstance(spec, Mapping):
        if "compose" in spec:
            return _composed(spec)
        if "reward" in spec and not isinstance(spec["reward"], (int, float)):
            options = {k: v for k, v in spec.items() if k not in ("reward", "weight")}
            return _from_name(spec["reward"], options)
        return _weighted(spec)
    if isinstance(spec, Sequence):
        return _summed(spec)
    return _from_object(spec, repr(spec), RewardModel)


def _from_text(text: str) -> RewardModel:
    from vision_rewards.spec import parse_spec

    weights = parse_spec(text)
    if list(weights.values()) == [1.0]:
        return _from_name(next(iter(weights)), {})
    return _weighted(weights)


def _from_name(name: Any, options: Mapping[str, Any]) -> RewardModel:
    from mmalign.protocols import RewardModel
    from vision_rewards.spec import split_checkpoint

    if not isinstance(name, str):
        return _from_object(name, repr(name), RewardModel)
    if name.startswith("remote:"):
        return _made("vision_rewards.serving.client:RemoteReward", name, options, name[7:])
    if _is_file(Path(name) / "reward.json"):
        return _made("vision_rewards.training.trained:load_trained", name, options, name)
    bare, checkpoint = split_checkpoint(name)
    if bare in REWARDS:
        given = {} if checkpoint is None else {"checkpoint": checkpoint}
        return _from_object(REWARDS.load(bare), name, RewardModel, _shipped({**given, **options}))
    if ":" not in name:
        REWARDS.load(bare)  # raises, with the nearest names
    return _from_object(user_object(name), name, RewardModel, options)


def _shipped(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint ``shipped:NAME`` is a folder of the suite's own assets, wherever those are."""
    checkpoint = options.get("checkpoint")
    if not isinstance(checkpoint, str) or not checkpoint.startswith(SHIPPED):
        return options
    return {**options, "checkpoint": str(asset(checkpoint.removeprefix(SHIPPED)))}


def user_object(name: str, kind: str = "reward") -> Any:
    """What ``path/to/file.py:name`` or ``package.module:name`` holds. The file is executed.

    Args:
        kind: what it should be, for messages.

    Raises:
        FileNotFoundError: no such file or module. UnknownNameError: it holds no such name.
    """
    where, _, attribute = name.rpartition(":")
    module = _from_file(Path(where), kind) if where.endswith(".py") else _from_package(where, name)
    if not hasattr(module, attribute):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown(f"{kind} in {where!r}", attribute, public)
    return getattr(module, attribute)


def _made(target: str, said: str, options: Mapping[str, Any], first: Any) -> RewardModel:
    module, _, attribute = target.partition(":")
    maker = getattr(importlib.import_module(module), attribute)
    return cast("RewardModel", maker(first, **_accepted(maker, said, options)))


def _accepted(maker: Any, said: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """``options``, where ``maker`` knows them all."""
    parameters = inspect.signature(maker).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return options
    for option in options:
        if option not in (names := [p.name for p in parameters]):
            raise unknown(f"option of reward {said!r}", option, names)
    return options


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def _from_package(module: str, said: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses something itself
        raise FileNotFoundError(
            f"reward {said!r}: there is no module {module!r}; give 'path/to/file.py:name', an "
            "importable 'package.module:name', or a name of 'mmalign list rewards'"
        ) from error


def _from_file(path: Path, kind: str = "reward") -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{kind} file {str(path)!r} does not exist")
    name = f"_user_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # true of every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    # Known by its name while it runs, as any module: dataclasses and pickle look it up.
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _from_object(
    found: Any, said: str, protocol: type, options: Mapping[str, Any] | None = None
) -> RewardModel:
    """``found`` itself, an instance of it, or a wrapper around it."""
    if options and not isinstance(found, type):
        raise ValueError(f"{said} takes no options, got {', '.join(options)}: it is ready made")
    if isinstance(found, type):  # before the protocol: a class has the protocol's names as well
        found = found(**_accepted(found, said, options or {}))
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

    return WeightedSum(_components(spec))


def _components(spec: Mapping[Any, Any]) -> dict[str, tuple[RewardModel, float]]:
    """``{label: (reward, weight)}`` of every way to write a mapping of parts."""
    components: dict[str, tuple[RewardModel, float]] = {}
    for name, given in spec.items():
        if isinstance(given, (tuple, list)) and len(given) == 2:
            part, weight = given
        elif isinstance(given, Mapping):
            part, weight = given, given.get("weight", 1.0)
        else:
            part, weight = name, given
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"the weight of {name!r} must be a number, got {weight!r}")
        components[str(name)] = (load_reward(part), float(weight))
    return components


def _composed(spec: Mapping[str, Any]) -> RewardModel:
    """``{"compose": kind, "parts": {label: ...} or [spec, ...], option: value}``."""
    from vision_rewards.compose import build

    parts = spec.get("parts")
    if isinstance(parts, (str, bytes)) or not isinstance(parts, (Mapping, Sequence)):
        raise ValueError(f"composition {spec['compose']!r} needs parts: a mapping or a list")
    if not isinstance(parts, Mapping):
        loaded = [load_reward(part) for part in parts]
        parts = {reward.info.name: (reward, 1.0) for reward in loaded}
        if len(parts) != len(loaded):
            raise ValueError("a reward is listed twice among parts; give labels: {label: reward}")
    options = {k: v for k, v in spec.items() if k not in ("compose", "parts", "weight")}
    return cast("RewardModel", build(spec["compose"], _components(parts), options))


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
