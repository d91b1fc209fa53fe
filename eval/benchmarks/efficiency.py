"""What a generator costs: pictures a second, latency, memory, network evaluations.

After ``warmup`` calls that do not count, each of ``repeats`` rounds measures::

    end to end      from the prompts of a batch to its 8-bit pictures in main memory
    network only    its denoising steps: prompts encoded before, nothing decoded
    one picture     end to end for a single prompt

Means over rounds, with 95 % bootstrap intervals over rounds. Memory is the peak of an end-to-end
call: of torch's allocator on CUDA, and of the process everywhere. The numbers belong to the
hardware, which the result names; nothing else should run on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from eval.result import finite
from eval.statistics import bootstrap_mean
from eval.timing import Timed
from mmalign.protocols import Policy, Request
from mmalign.runtime.measure import Memory, timed
from mmalign.runtime.progress import track
from mmalign.sampling.generate import autocast, generate, integrate, renoised
from mmalign.shapes import TASKS, prompts
from mmalign.types import Media, Score

GB = 1e9


class Efficiency:
    """Speed and memory of a generator, measured on this machine.

    Args:
        repeats: rounds that count, ``warmup`` rounds before them that do not.
        prompts: texts that are drawn, in turn; by default of the shapes world. Their length
            matters little: text encoders pad.

    Raises:
        ValueError: fewer than two repeats, no warm-up, or no prompts.
    """

    name = "efficiency"
    version = "1"
    unit = "score"

    def __init__(
        self, repeats: int = 10, warmup: int = 1, prompts: Sequence[str] | None = None
    ) -> None:
        if repeats < 2 or warmup < 1:
            raise ValueError(
                f"efficiency needs 2 repeats and 1 warm-up or more, got {repeats} and {warmup}"
            )
        texts = _texts() if prompts is None else tuple(prompts)
        if not texts or isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        self._texts, self._repeats, self._warmup = texts, repeats, warmup
        self.options: dict[str, Any] = {"repeats": repeats, "warmup": warmup}
        if prompts is not None:
            self.options["prompts"] = list(texts)

    def requests(self, limit: int | None = None) -> list[Request]:
        """None: no picture is kept."""
        return []

    def judge(self, media: Media, requests: Sequence[Request]) -> Score:
        """Not used: there is no picture to judge.

        Raises:
            ValueError: always.
        """
        raise ValueError("efficiency measures a generator; it cannot judge pictures")

    def time_policy(
        self,
        policy: Policy,
        *,
        batch_size: int,
        steps: int | None = None,
        guidance_scale: float | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> Timed:
        """Measure ``policy`` with batches of ``batch_size`` pictures."""
        began = time.perf_counter()
        run = _Run(policy, self._texts, batch_size, steps, guidance_scale, dtype)
        memory = [Memory(policy.device)]
        if policy.device.type == "cuda":
            memory.append(Memory(torch.device("cpu")))
        with track("efficiency", 3 * (self._repeats + self._warmup), 0, progress) as advance:
            clock = partial(
                timed, repeats=self._repeats, device=policy.device, warmup=self._warmup,
                advance=advance,
            )  # fmt: skip
            batch = clock(lambda: run.end_to_end(batch_size))
            peaks = {_MEMORY[m.kind]: m.peak() / GB for m in memory}
            network = clock(run.network_only(batch_size))
            single = clock(lambda: run.end_to_end(1))
        rates = [batch_size / s for s in batch]
        nfe = run.spent / run.pictures
        clocked = {
            "images/s": rates,
            "images/s, network only": [batch_size / s for s in network],
            "seconds for one picture": single,
        }
        means = {name: sum(values) / len(values) for name, values in clocked.items()}
        return Timed(
            values=tuple(rates),
            numbers={**means, **peaks, "network evaluations a picture": nfe, **_ends(clocked)},
            task="images/s",
            round=f"{batch_size} pictures",
            seconds=time.perf_counter() - began,
            nfe=run.spent + nfe * batch_size * (self._repeats + self._warmup),
        )


class _Run:
    """One policy with its settings; counts pictures and network evaluations of what it made."""

    def __init__(
        self,
        policy: Policy,
        texts: Sequence[str],
        batch_size: int,
        steps: int | None,
        guidance_scale: float | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.policy, self.dtype = policy, dtype
        self.texts = [texts[k % len(texts)] for k in range(batch_size)]
        self.steps = policy.sampler.steps if steps is None else steps
        own = policy.sampler.guidance_scale
        self.scale = own if guidance_scale is None else guidance_scale
        self.spent, self.pictures = 0, 0

    def end_to_end(self, count: int) -> None:
        """From prompts to 8-bit pictures in main memory."""
        media, nfe = generate(
            self.policy, self.texts[:count], list(range(count)), steps=self.steps,
            guidance_scale=self.scale, dtype=self.dtype,
        )  # fmt: skip
        media.data.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        self.spent, self.pictures = self.spent + nfe, self.pictures + count

    def network_only(self, count: int) -> Callable[[], None]:
        """The denoising steps, with everything around them done before."""
        policy = self.policy
        with torch.no_grad(), autocast(policy.device, self.dtype):
            conditioning = policy.encode(self.texts[:count])
        seeds = list(range(count))
        given = policy.init_noise(seeds), policy.sigmas(self.steps), conditioning, self.scale

        def steps() -> None:
            with autocast(policy.device, self.dtype):
                if policy.sampler.renoise:
                    renoised(policy, *given, seeds)
                else:
                    integrate(policy, *given)

        return steps


_MEMORY = {
    "cuda_allocated": "peak GB allocated on the GPU",
    "process_resident": "peak GB of the process",
}


def _ends(clocked: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Ends of the 95 % bootstrap intervals of the means."""
    found = {name: bootstrap_mean(values) for name, values in clocked.items()}
    low = {f"{name}, low": finite(one.low) for name, one in found.items()}
    return low | {f"{name}, high": finite(one.high) for name, one in found.items()}


def _texts() -> tuple[str, ...]:
    return tuple(text for task in TASKS for text in prompts("test", task, 4))
