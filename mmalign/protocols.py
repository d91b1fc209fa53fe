"""The contracts between the parts of the suite. Implementations need not inherit from these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmalign.reward_info import RewardInfo
from mmalign.types import Conditioning, Media, MediaKind, Regions, Rollout, Score, Step

Parameterisation = Literal["flow", "epsilon", "v"]
Spacing = Literal["stock", "even"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a policy is sampled by default: what its makers recommend, or its pipeline's defaults.

    ``renoise``: each step predicts the picture and noises it afresh, as consistency models want it.
    ``spacing``: the grid is the scheduler's own, or ``even``, so that its last step has work to do.
    """

    steps: int = 28
    guidance_scale: float = 4.5
    height: int = 512
    width: int = 512
    renoise: bool = False
    spacing: Spacing = "stock"


@runtime_checkable
class Policy(Protocol):
    """A generator seen as network + schedule + codec, over a stock diffusers pipeline.

    Latents are fp32 outside :meth:`predict`; sigma is the noise level in [0, 1].
    """

    name: str
    family: str
    parameterisation: Parameterisation
    media: MediaKind
    sampler: Sampler

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The network that :meth:`predict` calls and that training changes."""
        ...

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Name prefixes of layers whose output is discarded; they are left out of training."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, with the unconditional branch. Raises ``ValueError`` on a prompt that
        does not fit the text encoder, naming it."""
        ...

    def init_noise(self, seeds: Sequence[int]) -> Tensor:
        """Initial latents ``(B, ...)``; row ``i`` depends on ``seeds[i]`` alone."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The sampling grid, ``(steps + 1,)``, descending to the schedule's last level.

        Flow models run from 1 to 0, fp32; diffusion models through their schedule's levels
        ``sqrt(1 - abar)``, fp64, as ``abar`` would not survive rounding them.
        """
        ...

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """One network call (both branches of guidance batched); fp32, shaped like ``latents``.

        ``sigma`` is a scalar tensor or ``(B,)``.
        """
        ...

    def decode(self, latents: Tensor) -> Media:
        """Latents to media in [0, 1]; differentiable when gradients are enabled."""
        ...


@runtime_checkable
class Kernel(Protocol):
    """A pure transition rule; where samplers differ, and the only place they do.

    A kernel may name the parameterisations it understands in ``fits``; without it, flow only. One
    that understands several also has ``bound(parameterisation)``, itself for one of them.
    """

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise and have a density."""
        ...

    def step(
        self,
        x: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        prediction: Tensor,
        noise: Tensor | None = None,
        *,
        x_next: Tensor | None = None,
    ) -> Step:
        """Move ``x`` from ``sigma`` to ``sigma_next``.

        With ``noise`` the next state is drawn; with ``x_next`` it is given and its log-probability
        is evaluated (replay).
        """
        ...


@runtime_checkable
class RewardModel(Protocol):
    """Scores media. A composition of reward models is itself a reward model."""

    info: RewardInfo

    @property
    def identity(self) -> str:
        """Name, weights hash and settings: equal identities give equal scores."""
        ...

    def score(
        self,
        media: Media,
        prompts: Sequence[str],
        context: Sequence[Mapping[str, Any]] | None = None,
    ) -> Score:
        """Score a batch. What could not be judged is ``valid=False`` with a note.

        Differentiable models keep the graph; the caller decides on ``no_grad``.
        """
        ...


@runtime_checkable
class RegionReward(Protocol):
    """A reward that also says where a picture is right or wrong."""

    def regions(self, media: Media, prompts: Sequence[str]) -> Regions:
        """Judge the places of a batch. What could not be judged is ``valid=False`` with a note."""
        ...


@dataclass(frozen=True)
class Review:
    """What a critic says about one picture.

    Attributes:
        scores: of each aspect, on the critic's own scale; ``None`` where one does not apply.
        critique: in words.
        refined: a wording of the prompt that should give a better picture; empty where the critic
            has none.
    """

    scores: Mapping[str, float | None]
    critique: str = ""
    refined: str = ""


@runtime_checkable
class Critic(Protocol):
    """A judge that also says how the prompt should be worded next time."""

    def review(self, media: Media, prompts: Sequence[str]) -> tuple[Score, Sequence[Review | None]]:
        """Score a batch and review it; ``None`` where the answer could not be read."""
        ...


@runtime_checkable
class Objective(Protocol):
    """One algorithm's mathematics: a loss for each sample of a micro-batch of one step."""

    needs: frozenset[str]

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss ``(b,)``, with gradient, and detached per-sample metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a steering run cost.

    ``nfe`` are network evaluations (both branches of guidance count), ``reward_calls`` scored
    pictures, ``decodes`` decoded pictures; ``memory`` is the peak in bytes, of the allocator on
    CUDA and else of the process. Of the ``seconds``, ``working`` went into network, decoder, reward
    and gradients, and the rest is the method's own; on a GPU, where calls return before they are
    done, and around a stock pipeline's own loop it says little.
    """

    nfe: int = 0
    reward_calls: int = 0
    decodes: int = 0
    seconds: float = 0.0
    memory: int = 0
    working: float = 0.0


@dataclass(frozen=True)
class Steered:
    """Result of a steering run.

    Attributes:
        prompts: ``P`` of them.
        media, scores: the chosen sample of each prompt.
        chosen: its number among the candidates.
        candidates, candidate_scores: all finished samples.
        lineage: for each candidate its ``prompt`` (a number), ``seed``, ``rank`` among those of its
            prompt (1 is the chosen one, ``None`` unscored), and what the method adds: ``weight``,
            ``ancestors`` ...
        spent: what it all cost.
        trace: one record for each event that led there, in order and ready for JSON: the visits
            of a particle method, the iterations of an optimisation. Each names its ``prompt``.
    """

    prompts: tuple[str, ...]
    media: Media
    scores: Score
    chosen: tuple[int, ...]
    candidates: Media
    candidate_scores: Score
    lineage: tuple[Mapping[str, Any], ...]
    spent: Spent
    trace: tuple[Mapping[str, Any], ...] = ()

    @property
    def nfe(self) -> int:
        """Network evaluations spent."""
        return self.spent.nfe

    @property
    def reward_calls(self) -> int:
        """Pictures scored."""
        return self.spent.reward_calls


@dataclass(frozen=True)
class Snapshot:
    """How far a steering run is: what a progress bar or a page shows.

    ``best`` are the best scores so far, ``(P,)``, NaN where nothing was scored yet; ``media`` the
    pictures they belong to, where the method has them at hand.
    """

    done: int
    total: int
    best: Tensor
    media: Media | None = None


@runtime_checkable
class Steerer(Protocol):
    """Improves samples at inference time; checks capabilities before the first network call."""

    def run(
        self,
        policy: Policy,
        reward: RewardModel,
        prompts: Sequence[str],
        *,
        budget: Any = None,
        watch: Callable[[Snapshot], None] | None = None,
    ) -> Steered:
        """Steer one sample per prompt within a ``Budget``; ``watch`` sees how it goes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture a benchmark asks for; the noise seed depends on prompt and sample alone.

    Attributes:
        key: of the picture; distinct, and usable as a file name.
        item: of the prompt in the official data (a line number, an identifier), by which official
            folder layouts name files; empty where the benchmark has no such layout.
        metadata: the prompt's record in the official data, for layouts that keep it with the
            pictures and for judges that need it.
    """

    key: str
    prompt: str
    task: str
    sample: int
    seed: int
    item: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@runtime_checkable
class Benchmark(Protocol):
    """A versioned set of requests and the rule that turns pictures into numbers.

    Beside these a benchmark may have ``options`` (a mapping of its settings), ``identity`` (of what
    judges), ``scorers`` (names of the rewards its numbers rest on, so that a result made with the
    reward of the training is marked), ``layout`` (a name in :mod:`eval.layouts`), ``unit``
    (``share`` of right pictures, or ``score``; without it the values tell), ``numbers(rows)`` (what
    its authors report, by name), ``keeps_parts`` (whether that needs the parts of the scores) and
    ``seed_rule`` (in words). One that measures pictures as a set has ``measure_set`` (see
    :mod:`eval.sets`), one that measures the generator itself ``time_policy`` (:mod:`eval.timing`).
    One whose pictures are made from more than a prompt has ``generate`` in the place of
    :func:`mmalign.sampling.generate`, and ``check_policy`` to refuse those that cannot.
    """

    name: str
    version: str

    def requests(self, limit: int | None = None) -> list[Request]:
        """What to generate, in a fixed order."""
        ...

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Score pictures generated for ``requests``."""
        ...


__all__ = [
    "Benchmark",
    "Critic",
    "Kernel",
    "Objective",
    "Parameterisation",
    "Policy",
    "RegionReward",
    "Request",
    "Review",
    "RewardInfo",
    "RewardModel",
    "Rollout",
    "Sampler",
    "Snapshot",
    "Spent",
    "Steered",
    "Steerer",
]
