"""The training configuration: what a recipe may say, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.config import ConfigError
from trainers.pair_config import PairConfig
from trainers.panel_config import PanelConfig


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Where training prompts come from.

    ``source`` is ``shapes`` (drawn from the shapes world's training split), ``shapes:NAME`` (those
    that show one of its subjects) or a prompt file; ``tasks`` restricts ``shapes`` to some task
    families.
    """

    source: str = "shapes"
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained and in which precision.

    ``adapter`` is ``lora`` (peft, the reference is the adapter switched off) or ``full``.
    ``trainable`` restricts full training to parameters whose names contain one of these; empty
    means all. ``lora_targets`` are module name endings. ``precision`` is the autocast type of
    rollout and update alike: they must agree for the policy ratio to start at 1. ``compile`` names
    a back-end of ``torch.compile`` for the denoiser (``inductor``); empty leaves it as it is.
    """

    adapter: Literal["lora", "full"] = "lora"
    trainable: tuple[str, ...] = ()
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    attention: str = "native"
    gradient_checkpointing: bool = False
    compile: str = ""
    ema_decay: float = 0.0
    ema_every: int = 1


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Noise of each step, found by pilot rollouts before training; see trainers.calibration.

    ``rounds`` pilot rollouts; 0 leaves the kernel as it is. A step's noise is multiplied by
    ``1 + raise_by`` where at least ``0.5 - balance`` of its gains are positive, else by
    ``1 - lower_by``, within ``limits``. ``completion_steps`` as in ``dense_grpo``.
    """

    rounds: int = 0
    raise_by: float = 0.1
    lower_by: float = 0.1
    balance: float = 0.1
    limits: tuple[float, float] = (0.05, 3.0)
    completion_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "completion_steps"):
            _positive(f"rollout.calibration.{name}", getattr(self, name) + 1, "0 or more")
        for name, high in (("raise_by", 1.0), ("lower_by", 1.0), ("balance", 0.5)):
            value = getattr(self, name)
            if not 0 <= value < high:
                raise ConfigError(
                    f"rollout.calibration.{name} is {value}; it must lie in [0, {high})"
                )
        if not 0 < self.limits[0] < self.limits[1]:
            raise ConfigError(
                f"rollout.calibration.limits are {self.limits}; they must be positive and rise"
            )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How trajectories are sampled for training.

    ``train`` chooses the trained steps: ``all`` but the last; the first ``fraction`` of them; or
    a random ``window`` of that many steps starting in ``window_start`` (Flow-GRPO-Fast), drawn
    anew each update. Noise is added on trained steps only when a window is used, else on all.
    ``shared_noise`` gives the images of one prompt the same initial noise (DanceGRPO). ``size`` is
    the side of the pictures in pixels, in evaluation too; ``None`` takes the policy's own.
    ``spacing`` is how steps are spaced, in evaluation and the exported sampler too: as the policy
    has them (``stock``), or ``even``, so that the last of a flow model's grid has work to do.
    ``overlap`` scores each ``batch_size`` of pictures on a thread while the next are generated.
    ``window_strategy`` may also slide the window (MixGRPO), see :mod:`trainers.windows`.
    """

    steps: int = 10
    size: int | None = None
    spacing: Literal["stock", "even"] = "stock"
    guidance_scale: float | None = None
    kernel: str = "flow_sde"
    kernel_options: Mapping[str, Any] = field(default_factory=dict)
    train: Literal["all", "fraction", "window"] = "all"
    fraction: float = 1.0
    window: int = 2
    window_start: tuple[int, int] = (0, 4)
    window_strategy: Literal["random", "progressive", "decay"] = "random"
    window_stride: int = 1
    window_every: int = 25
    window_decay: float = 0.1
    window_decay_from: int = 13
    shared_noise: bool = False
    batch_size: int = 64
    overlap: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        _positive("rollout.steps", self.steps, "at least 1")
        if self.size is not None and (self.size < 16 or self.size % 16):
            raise ConfigError(f"rollout.size is {self.size}; it must be a multiple of 16 pixels")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"rollout.fraction is {self.fraction}; it must lie in (0, 1]")
        if self.train == "window":
            _positive("rollout.window", self.window, "at least 1 step")
        low, high = self.window_start
        if self.train == "window" and not 0 <= low <= high <= self.steps - 1 - self.window:
            raise ConfigError(
                f"rollout.window_start {self.window_start} with window {self.window} does not fit "
                f"{self.steps} steps; starts must lie in 0..{self.steps - 1 - self.window}"
            )
        self._check_strategy()

    def _check_strategy(self) -> None:
        for name in ("window_stride", "window_every"):
            _positive(f"rollout.{name}", getattr(self, name), "at least 1")
        if self.window_decay < 0:
            raise ConfigError(f"rollout.window_decay is {self.window_decay}; it must be 0 or more")
        if self.window_strategy != "random" and self.train != "window":
            raise ConfigError(
                f"rollout.window_strategy is {self.window_strategy!r}, but rollout.train is "
                f"{self.train!r}; use train: window"
            )


@dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """How forward-process objectives noise the clean latents of a rollout.

    Each sample gets ``draws`` pairs of noise level and noise per update. Levels are spread evenly
    over the quantiles of ``times``: ``uniform``, ``logit_normal`` (a normal of ``logit_mean`` and
    ``logit_std`` through the sigmoid), or ``grid``: those of the rollout's own steps. ``levels``
    bounds the levels before ``shift``, which moves them to ``m s / (1 + (m - 1) s)``.
    ``guidance_scale`` is that of the trained prediction; ``None`` takes the rollout's.
    """

    times: Literal["uniform", "logit_normal", "grid"] = "uniform"
    levels: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    draws: int = 4
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        _positive("forward.draws", self.draws, "at least 1")
        low, high = self.levels
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"forward.levels is {self.levels}; it must hold two rising levels in [0, 1]"
            )
        for name in ("shift", "logit_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"forward.{name} is {getattr(self, name)}; it must be positive")
        if self.times != "logit_normal" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ConfigError(
                f"forward.logit_mean and forward.logit_std mean nothing with forward.times "
                f"{self.times!r}; remove them or use times: logit_normal"
            )
        if self.times == "grid" and self.shift != 1.0:
            raise ConfigError(
                f"forward.shift is {self.shift}, but forward.times 'grid' takes the levels of the "
                "policy's own grid, which is shifted already; remove it"
            )


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How slowly a copy of the weights follows them: ``copy <- d copy + (1 - d) weights``.

    After ``u`` optimiser updates, ``d = start`` below ``flat`` and
    ``min(start + rate (u - flat), cap)`` from there on. The copy moves once per rollout. All zero,
    the default, makes the copy the very weights that made the rollout.
    """

    flat: int = 0
    start: float = 0.0
    rate: float = 0.0
    cap: float = 0.0

    def __post_init__(self) -> None:
        if self.flat < 0 or self.rate < 0:
            raise ConfigError(
                f"flat {self.flat} and rate {self.rate} of a decay must not be negative"
            )
        if not 0 <= self.start <= self.cap < 1:
            raise ConfigError(
                f"start {self.start} and cap {self.cap} of a decay must satisfy "
                "0 <= start <= cap < 1; at 1 the copy would never move"
            )
        if (self.rate > 0) != (self.cap > self.start):
            # A recipe that gives one of them does not keep the other's default.
            raise ConfigError(
                f"start {self.start}, rate {self.rate} and cap {self.cap} of a decay leave it at "
                f"{self.start}: a rate needs a cap above start, and such a cap a rate; write both, "
                "as in {rate: 0.05, cap: 0.3}"
            )

    def __call__(self, updates: int) -> float:
        """``d`` after that many optimiser updates."""
        if updates < self.flat:
            return self.start
        return min(self.start + self.rate * (updates - self.flat), self.cap)


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How scores become advantages; see :mod:`trainers.advantages`."""

    std: Literal["group", "global", "none"] = "global"
    baseline: Literal["group", "tracker"] = "group"
    combine: Literal["rewards", "advantages"] = "rewards"
    clip: float = 5.0
    eps: float = 1e-4
    keep: int = 0  # train on the best and worst keep/2 of each group; 0 keeps all
    select: Literal["all", "pareto"] = "all"  # pareto: those that none of their group dominates

    def __post_init__(self) -> None:
        if self.select == "pareto" and self.keep:
            raise ConfigError(
                f"advantage.keep is {self.keep} and advantage.select is 'pareto', which both say "
                "whom to train on; remove one"
            )
        for name in ("clip", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"advantage.{name} is {getattr(self, name)}; it must be positive")
        if self.keep < 0 or self.keep % 2:
            raise ConfigError(
                f"advantage.keep is {self.keep}; it must be even, for as many of the best as of "
                "the worst, or 0 to keep all"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser settings; ``updates_per_rollout`` splits each rollout into that many updates.

    An update that is not finite, or whose gradient norm is above ``skip_above`` times the median
    of those before it (0: whatever it is), is skipped. The run stops when more than
    ``max_skipped_share`` of the last 50 updates were, or of all of them while there are fewer.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    warmup: int = 0
    decay: bool = False
    updates_per_rollout: int = 1
    micro_batch: int = 0
    skip_above: float = 0.0
    max_skipped_share: float = 0.1

    def __post_init__(self) -> None:
        if self.skip_above != 0 and not self.skip_above > 1:
            raise ConfigError(
                f"optim.skip_above is {self.skip_above}; it must be above 1 (times the median "
                "gradient norm), or 0 for no such bound"
            )
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigError(
                f"optim.max_skipped_share is {self.max_skipped_share}; it must lie in [0, 1]"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured before and after training, and on the way.

    ``every`` so many steps, or at the first step past each multiple of ``every_nfe`` network
    evaluations; 0 switches either off.
    """

    benchmark: str = "shapes"
    prompts_per_task: int = 20
    samples_per_prompt: int = 2
    every: int = 0
    every_nfe: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 64
    enabled: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. The two batch dials are ``prompts_per_step`` and ``images_per_prompt``.

    It ends after ``steps``, or at the step whose end is nearest to ``max_nfe`` network evaluations
    (0: no such bound); ``optim.decay`` goes by ``steps`` either way.
    """

    policy: str
    algorithm: str = "flow_grpo"
    objective: Mapping[str, object] = field(default_factory=dict)
    reward: str | Mapping[str, Any] = "shapes_partial"
    output_dir: str = "runs/train"
    seed: int = 0
    steps: int = 100
    max_nfe: int = 0
    prompts_per_step: int = 8
    images_per_prompt: int = 8
    device: str = "auto"
    save_every: int = 10
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    max_failed_share: float = 0.5
    prompts: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    panel: PanelConfig | None = None
    pairs: PairConfig | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "save_every", "keep_checkpoints"):
            _positive(name, getattr(self, name), "at least 1")
        _positive("max_nfe", self.max_nfe + 1, "positive, or 0 for no bound")
        if self.images_per_prompt < 2:
            raise ConfigError(
                f"images_per_prompt is {self.images_per_prompt}; group-relative advantages need "
                "at least 2 images of a prompt to compare"
            )
        if self.advantage.keep >= self.images_per_prompt:
            raise ConfigError(
                f"advantage.keep is {self.advantage.keep}, but a prompt has only "
                f"{self.images_per_prompt} images (images_per_prompt); lower it, or set it to 0 "
                "to keep all"
            )
        if self.optim.updates_per_rollout > self.batch:
            raise ConfigError(
                f"optim.updates_per_rollout {self.optim.updates_per_rollout} exceeds the "
                f"{self.batch} images of a rollout"
            )

    @property
    def batch(self) -> int:
        """Images per rollout, over all processes."""
        return self.prompts_per_step * self.images_per_prompt


# Settings that may change between a run and its resumption without making it another run.
RESUMABLE_CHANGES = (
    "output_dir", "steps", "max_nfe", "save_every", "keep_checkpoints", "trackers", "device",
    "evaluation", "panel",
)  # fmt: skip


def _positive(name: str, value: int, allowed: str) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be {allowed}")
