"""Speed and memory of reward models, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmalign.config import ConfigError
from mmalign.protocols import RewardModel
from mmalign.runtime.device import pick_device, pick_dtype
from mmalign.runtime.log import say
from mmalign.runtime.measure import Memory, count_flops, cpu_threads, matmul_ceiling, spread, timed
from mmalign.runtime.versions import environment
from mmalign.types import Media, Score
from vision_rewards.factory import load_reward

# Every reward has to judge what it is timed on: the prompt is inside the shapes world's grammar,
# text recognition finds the words to look for, and the detector a class, in the facts.
PROMPT = "a photo of a red star"
FACTS = {"text": "star", "geneval": {"tag": "single_object", "include": [{"class": "person"}]}}
PICTURES = ("reference", "opponent", "source")  # facts that are pictures, where they are needed


def bench_rewards(
    rewards: Sequence[Any],
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    size: int = 64,
    repeats: int = 3,
    device: str = "auto",
    dtype: str = "fp32",
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure how many images a second each reward scores.

    Args:
        rewards: whatever :func:`~vision_rewards.factory.load_reward` takes, each measured alone.
        batch_sizes: images of one call.
        size: side of the pictures in pixels, before the reward's own preprocessing.
        repeats: timings of each, after one that does not count.
        dtype: the precision of the matrix product that a share is taken of; a reward's own
            precision is an option of the reward.

    Returns:
        ``rewards``: for each, ``identity``, ``gflop_per_image`` (``gflop_per_call`` besides, for
        the one prompt of a call) and ``batches`` with seconds, images a second, TFLOP/s of its
        networks and their share of the ceiling, peak memory; ``matmul``; ``settings``;
        ``environment``. On a CPU memory is the peak of the whole process, which only grows.

    Raises:
        ConfigError: a batch size, size or number of repeats below 1, or a reward that leaves every
            picture unscored: its rate would be that of doing nothing.
    """
    for name, value in (("size", size), ("repeats", repeats), *(("batch", b) for b in batch_sizes)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    place = pick_device(device)
    precision = pick_dtype(dtype, place) or torch.float32
    with cpu_threads(threads), torch.no_grad():
        ceiling = matmul_ceiling(place, precision, repeats)
        measured = [_measure(r, batch_sizes, size, repeats, place, ceiling) for r in rewards]
        used = torch.get_num_threads()
    settings = {"device": str(place), "size": size, "repeats": repeats, "threads": used}
    return {
        "rewards": measured,
        "matmul": ceiling,
        "settings": settings,
        "environment": environment(),
    }


def _measure(
    spec: Any, batch_sizes: Sequence[int], size: int, repeats: int, device: torch.device,
    ceiling: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    reward = load_reward(spec)
    memory, batches = Memory(device), []
    one, two = (_call(reward, count, size, device) for count in (1, 2))
    _check_scored(reward, two)  # two: a reward that compares needs company
    per_call, flops = _flops(one, two)
    for count in batch_sizes:
        call = _call(reward, count, size, device)
        memory.reset()
        seconds = timed(call, repeats, device)
        rate = spread([count / s for s in seconds])
        tflops = rate["median"] * (flops + per_call / count) / 1e12
        batches.append(
            {
                "batch_size": count,
                "seconds": spread(seconds),
                "images_per_second": rate,
                "tflops": tflops,
                "share_of_matmul": tflops / ceiling["tflops"],
                "peak_bytes": memory.peak(),
            }
        )
        say(f"bench {reward.info.name}: batch {count}, {rate['median']:.4g} images/s")
    kind = memory.kind
    return {
        "reward": reward.info.name, "identity": reward.identity, "gflop_per_image": flops / 1e9,
        "gflop_per_call": per_call / 1e9, "memory": kind, "batches": batches,
    }  # fmt: skip


def _flops(one: Callable[[], Score], two: Callable[[], Score]) -> tuple[int, int]:
    """What a call costs whatever its size, and what each picture adds to it."""
    first, second = count_flops(one), count_flops(two)
    each = min(max(second - first, 0), first)
    return first - each, each


def _check_scored(reward: RewardModel, call: Callable[[], Score]) -> None:
    score = call()
    if not bool(score.valid.any()):
        said = score.notes[0] if score.notes else "it gives no reason"
        raise ConfigError(
            f"reward {reward.info.name!r} does not score the picture and prompt of the benchmark "
            f"({PROMPT!r}): {said}. Its rate would be that of doing nothing"
        )


def _media(count: int, size: int, device: torch.device) -> Media:
    generator = torch.Generator().manual_seed(0)
    # Half plain, half noise: rewards that segment or compress see something of both.
    noise = torch.rand(count, 3, size, size, generator=generator)
    noise[..., : size // 2] = 0.5
    return Media(noise.to(device))


def _call(reward: RewardModel, count: int, size: int, device: torch.device) -> Callable[[], Score]:
    """One call of the reward on pictures and facts that are made beforehand, not timed."""
    media = _media(count, size, device)
    needed = [name for name in PICTURES if name in reward.info.needs]
    facts = {**FACTS, **dict.fromkeys(needed, media[:1].to_pil()[0])}
    # One prompt for all: text is encoded once, as in training, where prompts are few.
    return lambda: reward.score(media, [PROMPT] * count, [facts] * count)
