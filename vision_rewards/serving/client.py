"""A reward on a server, seen from here: the same scores, with a wait where the server is gone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from mmalign.reward_info import RewardInfo
from mmalign.types import Media, Score
from vision_rewards.guard import RewardUnavailableError
from vision_rewards.serving import wire
from vision_rewards.serving.replicas import Replica, Replicas, parse_addresses
from vision_rewards.serving.safety import Limits, WireError

TOKEN = "MMALIGN_REWARD_TOKEN"
Transport = Literal["tensors", "png"]


class RemoteReward:
    """A reward model that a ``mmalign serve-reward`` elsewhere answers for.

    What it declares is the server's declaration, except for gradients, which do not travel. Its
    identity is the server's too, and every answer must carry it: a server that comes back with
    another reward is refused. A pointwise batch is shared out over the replicas; a server that
    does not answer is tried again, in turn with the others, for up to ``wait`` seconds.

    Args:
        address: ``http://host:port``, or several with commas between (or as a list).
        token: bearer token; by default the content of the variable ``token_env``, where it is set.
            Recipes and run folders hold no secret that way.
        token_env: name of that variable.
        timeout: seconds a server may take for one request.
        wait: seconds of trying again before giving up; 0 gives up at once.
        transport: ``tensors`` is lossless, so scores are those of the same reward here; ``png``
            rounds pictures to 8 bits and is part of the identity.

    Raises:
        ValueError: an unusable address or option, or replicas that serve different rewards.
        RewardUnavailableError: no server answered, or it refused the token.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        token: str | None = None,
        token_env: str = TOKEN,
        timeout: float = 300.0,
        wait: float = 300.0,
        transport: Transport = "tensors",
    ) -> None:
        if transport not in ("tensors", "png"):
            raise ValueError(f"transport is {transport!r}; use 'tensors' or 'png'")
        if timeout <= 0 or wait < 0:
            raise ValueError(f"timeout {timeout} must be above 0 and wait {wait} at least 0")
        secret = token if token is not None else os.environ.get(token_env) or None
        self._content_type = wire.TENSORS if transport == "tensors" else wire.JSON
        replicas = [Replica(url, secret, timeout) for url in parse_addresses(address)]
        self._replicas = Replicas(replicas, wait)
        said = self._replicas.declaration()
        self._served = str(said["identity"])
        self.info = _info(said["info"])
        self.versions: Mapping[str, Any] = said.get("versions", {})
        self.weights: Mapping[str, float] = said.get("weights", {})
        self.whole_batch = bool(said.get("whole_batch", False))
        known = {f.name for f in fields(Limits)}
        self._limits = Limits(**{k: v for k, v in said["limits"].items() if k in known})

    @property
    def identity(self) -> str:
        """The server's, with ``+png8`` where pictures are rounded on their way."""
        return self._served + ("+png8" if self._content_type == wire.JSON else "")

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Score a batch on the servers.

        Raises:
            ValueError: a call the server could never answer (kind of media, lengths, limits).
            RewardUnavailableError: nobody answered for ``wait`` seconds, or with another reward.
            RemoteRewardError: the reward itself raised; trying again would not help.
            TypeError: the context holds something that cannot be sent.
        """
        call = self._checked(media, prompts, context)
        if not len(call):
            return Score.of(torch.zeros(0, device=media.data.device), self.identity)
        parts = self._shared_out(call)
        bodies = [wire.encode_call(part, self._content_type) for part in parts]
        for body in bodies:
            self._limits.check_bytes(len(body))
        with ThreadPoolExecutor(max_workers=max(1, min(len(bodies), len(self._replicas)))) as pool:
            scores = list(pool.map(self._ask, bodies, range(len(bodies))))
        for part, score in zip(parts, scores, strict=True):
            if len(score) != len(part):
                raise RewardUnavailableError(
                    f"reward server {self._replicas} answered {len(score)} scores for {len(part)} "
                    "samples; it is no mmalign reward server of this version"
                )
        return replace(Score.cat(scores), identity=self.identity).to(media.data.device)

    def _ask(self, body: bytes, number: int) -> Score:
        def read(answer: bytes) -> Score:
            try:
                score = wire.decode_score(answer, self._content_type)
            except WireError as error:
                raise RewardUnavailableError(f"reward server {self._replicas}: {error}") from error
            if score.identity != self._served:
                raise RewardUnavailableError(
                    f"a server of {self._replicas} now serves {score.identity!r}, not "
                    f"{self._served!r}: scores of two rewards cannot be mixed. Serve the first one "
                    "again and resume"
                )
            return score

        return self._replicas.post("/score", body, self._content_type, number, read)

    def _checked(
        self, media: Media, prompts: Sequence[str], context: Sequence[Mapping[str, Any]] | None
    ) -> wire.Call:
        if media.kind not in self.info.media:
            takes = ", ".join(self.info.media)
            raise ValueError(f"reward {self.info.name!r} takes {takes}, got a {media.kind}")
        if len(prompts) != len(media) or (context is not None and len(context) != len(media)):
            given = len(prompts), None if context is None else len(context)
            raise ValueError(f"{given[0]} prompts and {given[1]} contexts for {len(media)} samples")
        return wire.Call(media, tuple(prompts), None if context is None else tuple(context))

    def _shared_out(self, call: wire.Call) -> list[wire.Call]:
        """Requests within the server's limits, at least one for each replica.

        The shares depend on how many replicas are named, not on how many are alive: a batch is
        always cut in the same places.
        """
        if self.info.scope != "pointwise":
            return [call]
        shape = call.media.data.shape[1:]
        frames = shape[0] if len(shape) == 4 else 1
        pixels = max(1, frames * shape[-1] * shape[-2])
        # Headers, prompts and context come on top of the pixels: half the bytes are left to them.
        size = max(1, call.media.data[0].numel() * call.media.data.element_size())
        fitting = min(
            self._limits.max_images,
            self._limits.max_pixels // pixels,
            self._limits.max_bytes // (2 * size),
        )
        share = -(-len(call) // len(self._replicas))
        return call.split(max(1, min(fitting, share)))


def _info(given: Mapping[str, Any]) -> RewardInfo:
    """The server's declaration; what a newer server says beyond ours is left out."""
    known = {f.name for f in fields(RewardInfo)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known
    }
    return RewardInfo(**{**values, "differentiable": False})
