"""FK steering of a stock pipeline's own call: any diffusers pipeline, any of its options.

The pipeline runs its own loop, with its own schedule, guidance and conditioning; between its steps
the steered scheduler weighs and resamples the particles.  Where there is a policy for the pipeline,
:class:`mmalign.steering.fk.Fk` gives the same particles.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Kernel, RewardModel, Sampler, Steered
from mmalign.steering.engine import Engine, Watch, scored
from mmalign.steering.feynman_kac import Filter
from mmalign.steering.fk import FLOW, Fk, affordable, chosen_kernel
from mmalign.steering.levels import parameterisation
from mmalign.steering.stock import Controller, StepState, steered
from mmalign.types import Conditioning, Media, Score

# What steering gives the pipeline itself, and why the caller cannot.
_TAKEN = {
    "generator": "every particle has a generator of its own; use seed",
    "latents": "every particle has noise of its own; use seed",
    "num_images_per_prompt": "that is the number of particles; use k",
    "num_videos_per_prompt": "that is the number of particles; use k",
    "output_type": "the result holds media in [0, 1]",
    "return_dict": "the result is a Steered",
    "prompt_embeds": "the reward needs the prompts themselves",
}
# Whose own step adds noise, drawn from the generators the pipeline hands on.
_STOCHASTIC = (
    "DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler", "TCDScheduler",
)  # fmt: skip


@torch.no_grad()
def steer_pipeline(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    reward: RewardModel,
    method: str | Fk = "fk",
    k: int | None = None,
    seed: int | None = None,
    native: bool = False,
    budget: Any = None,
    watch: Watch | None = None,
    **call: Any,
) -> Steered:
    """Steer a pipeline's own call with ``k`` particles a prompt.

    Args:
        pipe: a diffusers pipeline object (SD, SDXL, SD3, FLUX, Wan ...), used in place.
        prompt: one, or several.
        reward: judges the pictures or videos that the pipeline makes.
        method: ``"fk"``, or a :class:`~mmalign.steering.fk.Fk` with options of its own. Its
            ``steps``, ``guidance_scale`` and ``dtype`` are the call's and the pipeline's here.
        k, seed: override the method's.
        native: keep the scheduler's own step, which must be a stochastic one (Euler ancestral,
            LCM, DDPM, DDIM with ``eta``), in place of the method's kernel.
        budget, watch: as for every method; evaluations are counted at the network itself.
        call: everything else is handed to the pipeline: ``num_inference_steps``,
            ``guidance_scale``, ``negative_prompt``, ``height`` ...

    Raises:
        ValueError: another method, an option that steering itself sets, a scheduler or a kernel
            that cannot be steered, or a reward that cannot judge the pipeline's media; all before
            the network is first called.
    """
    method = _method(method, k, seed)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _check_call(pipe, call, len(prompts))
    stock = StockPipeline(pipe, call)
    _check_caches(stock)
    visits = method.visits(stock.sampler.steps)
    kernel: Kernel | None = None
    if native:
        _check_native(pipe, call, bool(visits))
    else:
        kernel = chosen_kernel(method.kernel, method.kernel_options, stock.parameterisation, FLOW)
    policy: Any = stock
    engine = Engine(
        policy, reward, prompts, method="fk", budget=budget, watch=watch,
        guidance_scale=2.0 if stock.branches == 2 else 1.0, batch_size=method.batch_size,
    )  # fmt: skip
    each, visits = affordable(engine, method.k, visits)
    return _Run(method, engine, stock, kernel, each, visits).result(call)


class StockPipeline:
    """A pipeline as the engine of a steering method sees it; its loop stays its own."""

    family = "stock"
    unused_modules: tuple[str, ...] = ()

    def __init__(self, pipe: Any, call: Mapping[str, Any]) -> None:
        self.pipeline = pipe
        self.name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
        self.parameterisation = parameterisation(pipe.scheduler)
        self.options = _with_defaults(pipe, call)
        self.media = "video" if "num_frames" in self.options else "image"
        self.branches = _branches(self.options)
        height, width = _size(pipe, self.options)
        self.sampler = Sampler(steps=_steps(self.options), height=height, width=width)
        self._vae: Any = None

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return self.pipeline._execution_device  # type: ignore[no-any-return]

    @property
    def denoiser(self) -> Any:
        """The pipeline's network; the first of two."""
        return self.networks[0]

    @property
    def networks(self) -> list[Any]:
        """All that the pipeline may call in its loop."""
        names = ("unet", "transformer", "transformer_2")
        found = (getattr(self.pipeline, name, None) for name in names)
        return [network for network in found if network is not None]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Nothing: the pipeline encodes by itself."""
        rows = {"row": torch.zeros(len(prompts), 1)}
        return Conditioning(rows, rows)

    def decode(self, latents: Tensor) -> Media:
        """What the pipeline's loop works on, to pictures ``(B, C, H, W)`` or videos
        ``(B, T, C, H, W)``."""
        if latents.ndim == 3:
            if not hasattr(self.pipeline, "_unpack_latents"):
                raise ValueError(f"{self.name} packs its latents in a way not known here")
            size = self.sampler.height, self.sampler.width
            scale = self.pipeline.vae_scale_factor
            latents = self.pipeline._unpack_latents(latents, *size, scale)
        vae = self._decoder()
        pixels = vae.decode(_unscaled(latents, vae.config).to(vae.dtype), return_dict=False)[0]
        if pixels.ndim == 5:
            pixels = pixels.transpose(1, 2)
        return Media((pixels.float() / 2 + 0.5).clamp(0, 1))

    def _decoder(self) -> Any:
        """The autoencoder; a copy in fp32 where fp16 overflows in it (``force_upcast``)."""
        vae = self.pipeline.vae
        if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
            return vae
        if self._vae is None:
            self._vae = copy.deepcopy(vae).float()
        return self._vae

    @contextmanager
    def counting(self, add: Callable[[int], None]) -> Iterator[None]:
        """Tell ``add`` the rows of every network call."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            add(len(first))  # type: ignore[arg-type]

        hooks = [n.register_forward_pre_hook(hook, with_kwargs=True) for n in self.networks]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


class _Run(Controller):
    """FK as a controller: the same filter as the own loop's, between the pipeline's steps."""

    def __init__(
        self, method: Fk, engine: Engine, stock: StockPipeline, kernel: Kernel | None, k: int,
        visits: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.method, self.engine, self.stock = method, engine, stock
        self.kernel, self.k, self.visits = kernel, k, visits
        self.owners = engine.owners(k)
        self.seeds = engine.seeds(self.owners, seed=method.seed)
        self.best = torch.full((len(engine.prompts),), torch.nan)

    def result(self, call: Mapping[str, Any]) -> Steered:
        """One call of the pipeline for as many prompts as a batch holds, then the choice."""
        parts, each = [], max(1, self.method.batch_size // self.k)
        with self.stock.counting(self._count):
            for at in range(0, len(self.engine.prompts), each):
                parts.append(self._call(range(at, min(at + each, len(self.engine.prompts))), call))
        media, scores, orders, lineage, trace = zip(*parts, strict=True)
        return self.engine.finish(
            Media.cat(media), Score.cat(scores), self.owners, [*chain(*lineage)],
            [*chain(*trace)], torch.cat(orders),
        )  # fmt: skip

    def _call(self, numbers: range, call: Mapping[str, Any]) -> tuple[Any, ...]:
        """Media, scores, ranking, lineage and trace of these prompts."""
        self.numbers = numbers
        self.rows = torch.nonzero(torch.isin(self.owners, torch.tensor(list(numbers)))).flatten()
        seeds = [self.seeds[row] for row in self.rows.tolist()]
        prompts = [self.engine.prompts[n] for n in numbers]
        key = (self.engine.method, self.method.seed)
        self.filter = Filter(prompts, self.k, self.method.rule(), key)
        with steered(self.stock.pipeline, self, kernel=self.kernel, seeds=seeds):
            latents = self._latents(prompts, seeds, call)
        media, scores = self.engine.judge(latents, self.owners[self.rows])
        self.filter.last(scores, self.engine.steps)
        self._show(self.engine.steps, scores)
        trace = [{**line, "prompt": numbers[line["prompt"]]} for line in self.filter.trace]
        order = self.filter.order(self.method.choose, scores)
        return media, scores, order, self.filter.lineage(seeds), trace

    def _latents(
        self, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]
    ) -> Tensor:
        each = "num_videos_per_prompt" if self.stock.media == "video" else "num_images_per_prompt"
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        own = {
            name: [value[n] for n in self.numbers] if _for_each_prompt(name, value) else value
            for name, value in call.items()
        }
        taken = {each: self.k, "generator": generators, "output_type": "latent"}
        done = self.stock.pipeline(prompt=list(prompts), **own, **taken, return_dict=False)
        return done[0]  # type: ignore[no-any-return]

    def before(self, state: StepState) -> Tensor | None:
        """Visit the states that this step starts from."""
        return self._visit(state, state.index) if self.method.estimate == "new" else None

    def after(self, state: StepState) -> Tensor | None:
        """Visit the states that this step led to, by the estimates made before it."""
        return self._visit(state, state.index + 1) if self.method.estimate == "lagged" else None

    def _visit(self, state: StepState, n: int) -> Tensor | None:
        # A batch must keep its size inside a pipeline, so that all there is to save is visits.
        if n not in self.visits or not self.engine.meter.allows():
            return None
        owners = self.owners[self.rows]
        _, scores = self.engine.judge(state.estimates[0], owners, self.method.decoder)
        sigma = state.sigma if n == state.index else state.sigma_next
        rows = self.filter.visit(scores, n, self.engine.steps, float(sigma))
        self._show(n, scores)
        return rows

    def _show(self, n: int, scores: Score) -> None:
        values = torch.where(scored(scores), scores.value, -torch.inf).cpu().view(-1, self.k)
        best = values.amax(1)
        self.best[list(self.numbers)] = torch.where(torch.isfinite(best), best, torch.nan)
        steps, done = self.engine.steps, self.numbers[0]
        self.engine.show(
            done * steps + n * len(self.numbers), steps * len(self.engine.prompts),
            self.best.clone(),
        )  # fmt: skip

    def _count(self, rows: int) -> None:
        self.engine.meter.nfe += rows


# -- what the call means -----------------------------------------------------------------------


def _method(method: str | Fk, k: int | None, seed: int | None) -> Fk:
    if isinstance(method, str):
        if method != "fk":
            raise ValueError(
                f"method {method!r} does not work between the steps of a pipeline's own loop; "
                "here it must be 'fk' or an Fk. For the others use mmalign.steer, which takes "
                "pipeline objects too"
            )
        method = Fk()
    given = {"k": k, "seed": seed}
    return replace(method, **{name: v for name, v in given.items() if v is not None})  # type: ignore[arg-type]


def _check_call(pipe: Any, call: Mapping[str, Any], prompts: int) -> None:
    for name in call:
        if name in _TAKEN:
            raise ValueError(f"{name} is set by steering itself: {_TAKEN[name]}")
        if name not in inspect.signature(pipe.__call__).parameters:
            raise ValueError(f"{type(pipe).__name__} takes no option {name!r}")
    for name, value in call.items():
        if _for_each_prompt(name, value) and len(value) != prompts:
            raise ValueError(f"{name} has {len(value)} entries for {prompts} prompts")


def _check_caches(stock: StockPipeline) -> None:
    for network in stock.networks:
        if getattr(network, "is_cache_enabled", False):
            raise ValueError(
                f"the feature cache of {type(network).__name__} is on: what it remembers of each "
                "sample would stay behind when particles move. Turn it off with disable_cache()"
            )


def _for_each_prompt(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, (list, tuple))


def _check_native(pipe: Any, call: Mapping[str, Any], needed: bool) -> None:
    """The scheduler's own step must add noise, or the copies of a particle never part."""
    kind = type(pipe.scheduler).__name__
    noisy = kind in _STOCHASTIC or (kind == "DDIMScheduler" and call.get("eta", 0) > 0)
    noisy = noisy or "sde" in str(pipe.scheduler.config.get("algorithm_type"))
    if needed and not noisy:
        raise ValueError(
            f"the own step of {kind} adds no noise here, so the copies of a particle would stay "
            "equal to the end; leave native out, or use one that does: "
            f"{', '.join(_STOCHASTIC)}, or DDIMScheduler with eta above 0"
        )


def _with_defaults(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(pipe.__call__).parameters.items()
    return {**{n: p.default for n, p in parameters if p.default is not p.empty}, **call}


def _steps(options: Mapping[str, Any]) -> int:
    for name in ("timesteps", "sigmas"):
        if options.get(name) is not None:
            return len(options[name])
    return int(options["num_inference_steps"])


def _branches(options: Mapping[str, Any]) -> int:
    """Network evaluations a step: 2 where the call means classifier-free guidance."""
    if "true_cfg_scale" in options:  # guidance-distilled: the other scale is a network input
        negative = options.get("negative_prompt") is not None
        return 2 if options["true_cfg_scale"] > 1 and negative else 1
    return 2 if (options.get("guidance_scale") or 0) > 1 else 1


def _size(pipe: Any, options: Mapping[str, Any]) -> tuple[int, int]:
    if options.get("height") and options.get("width"):
        return int(options["height"]), int(options["width"])
    side = getattr(pipe, "default_sample_size", None) or pipe.unet.config.sample_size
    side = side * pipe.vae_scale_factor
    return options.get("height") or side, options.get("width") or side


def _unscaled(latents: Tensor, config: Any) -> Tensor:
    """Latents as the autoencoder takes them: its own scale, shift or channel statistics."""
    scale, mean, std = (config.get(n) for n in ("scaling_factor", "latents_mean", "latents_std"))
    latents = latents.float()
    if mean is not None and std is not None:
        shape = (1, -1, *([1] * (latents.ndim - 2)))
        mean, std = (latents.new_tensor(v).view(shape) for v in (mean, std))
        return latents * std / (scale or 1.0) + mean
    return latents / (scale or 1.0) + (config.get("shift_factor") or 0.0)  # type: ignore[no-any-return]


__all__ = ["StockPipeline", "steer_pipeline"]
