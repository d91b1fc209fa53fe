"""A plain Python function of the user's as a reward model."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.protocols import RewardInfo
from mmalign.types import Media, MediaKind, Score

Takes = Literal["pil", "tensor"]
Range = tuple[float | None, float | None]


class FunctionReward:
    """Wraps ``fn(images, prompts)`` or ``fn(images, prompts, context)``.

    The function returns one number per picture: a sequence, array or tensor of length ``B``.
    ``None`` or a non-finite number marks a picture as unscored.

    Args:
        fn: the function. It is given ``context`` if a parameter bears that name, or if it has a
            third positional parameter without a default.
        name: what to call the reward; by default the function's own name.
        takes: ``"pil"`` hands over a list of PIL images, ``"tensor"`` the media tensor
            ``(B, C, H, W)`` or ``(B, T, C, H, W)``, float in [0, 1].
        media: kinds of media the function accepts; videos need ``takes="tensor"``.
        differentiable: keep the graph through the function; needs ``takes="tensor"``.
        deterministic: whether equal inputs give equal scores.
        range: lowest and highest possible value, ``None`` for an open end.

    Raises:
        TypeError: ``fn`` is not callable, or its signature is neither of the two.
        ValueError: options that contradict each other.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str | None = None,
        *,
        takes: Takes = "pil",
        media: tuple[MediaKind, ...] = ("image",),
        differentiable: bool = False,
        deterministic: bool = True,
        range: Range = (None, None),
    ) -> None:
        if takes not in ("pil", "tensor"):
            raise ValueError(f"takes={takes!r} is unknown; use 'pil' or 'tensor'")
        if takes == "pil" and (differentiable or "video" in media):
            raise ValueError("videos and gradients need takes='tensor', got takes='pil'")
        self.fn = fn
        self.takes = takes
        self._how = _context_style(fn)
        own_name = name or str(getattr(fn, "__name__", type(fn).__name__))
        self.info = RewardInfo(
            name=own_name,
            media=media,
            differentiable=differentiable,
            deterministic=deterministic,
            range=range,
            summary=(inspect.getdoc(fn) or f"the function {own_name}").splitlines()[0],
            source="a function of the user's",
            licence="the user's own",
        )
        self._identity = f"{own_name}@{_fingerprint(fn)}-{takes}"

    @property
    def identity(self) -> str:
        """Name and a digest of the function's source; what the function reads is not covered."""
        return self._identity

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Call the function once on the whole batch.

        Raises:
            ValueError: the kind of media is not accepted, or the function did not return one
                number for each sample. Exceptions of the function pass through;
                :class:`~vision_rewards.guard.GuardedReward` turns them into unscored samples.
        """
        if media.kind not in self.info.media:
            allowed = ", ".join(self.info.media)
            raise ValueError(f"reward {self.info.name!r} takes {allowed}, got a {media.kind}")
        arguments = (self._inputs(media), list(prompts))
        if self._how == "positional":
            result = self.fn(*arguments, context)
        elif self._how == "keyword":
            result = self.fn(*arguments, context=context)
        else:
            result = self.fn(*arguments)
        value, notes = _read(result, len(media), self.info.name)
        if not self.info.differentiable:
            value = value.detach()
        return Score.of(value.to(media.data.device), self.identity, notes)

    def _inputs(self, media: Media) -> Any:
        if self.takes == "pil":
            return media.to_pil()
        return media.data if self.info.differentiable else media.data.detach()


def _context_style(fn: Callable[..., Any]) -> Literal["positional", "keyword", "none"]:
    if not callable(fn):
        raise TypeError(f"a reward function must be callable, got {type(fn).__name__}")
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except ValueError:  # builtins have no signature: the plain form is all there is to try
        return "none"
    if any(p.name == "context" and p.kind is not p.POSITIONAL_ONLY for p in parameters):
        return "keyword"
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in places)
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if keywords or required > 3 or (len(places) < 2 and not spread):
        raise TypeError(
            f"{getattr(fn, '__name__', fn)}{inspect.signature(fn)} cannot be a reward: it must be "
            "callable as fn(images, prompts) or fn(images, prompts, context)"
        )
    return "positional" if required == 3 else "none"


def _read(result: Any, expected: int, name: str) -> tuple[Tensor, list[str]]:
    """One fp32 number per sample (NaN where unscored) and the reason for each that is not."""
    if isinstance(result, Tensor):
        value = result.float()
    else:
        value = torch.tensor(_numbers(result, name), dtype=torch.float32)
    if value.shape != (expected,):
        got = f"shape {tuple(value.shape)}" if value.ndim != 1 else f"{len(value)} values"
        raise ValueError(
            f"reward function {name!r} returned {got} for {expected} samples; "
            f"return one number (or None) for each, as a list or an array of shape ({expected},)"
        )
    finite = torch.isfinite(value.detach()).tolist()
    return value, ["" if ok else f"{name} gave no finite number" for ok in finite]


def _numbers(result: Any, name: str) -> list[Any]:
    if isinstance(result, (str, bytes, Mapping)) or not isinstance(result, Iterable):
        raise ValueError(
            f"reward function {name!r} returned a {type(result).__name__}; "
            "return a list, array or tensor with one number (or None) for each sample"
        )
    if hasattr(result, "tolist"):
        result = result.tolist()
    rows = list(result)
    for row in rows:
        if isinstance(row, (str, bytes)):
            raise ValueError(f"reward function {name!r} returned {row!r} where a number belongs")
    return [math.nan if row is None else row for row in rows]


def _fingerprint(fn: Callable[..., Any]) -> str:
    target = fn if inspect.isroutine(fn) else type(fn)
    try:
        text = inspect.getsource(target)
    except (OSError, TypeError):  # defined at a prompt, or compiled
        code = getattr(fn, "__code__", None)
        text = repr((code.co_code, code.co_consts, code.co_names)) if code else repr(target)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
