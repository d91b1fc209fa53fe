"""Validation and test splits that share neither a prompt nor a picture with training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmalign.runtime.seeds import stable_seed
from vision_rewards.training.records import Dataset, Sample


class SplitError(ValueError):
    """Data that cannot be split as asked, or splits that overlap; names the cause and the fix."""


@dataclass(frozen=True)
class Split:
    """Three data sets without a common prompt or picture; validation and test may be empty."""

    train: Dataset
    validation: Dataset
    test: Dataset


def groups_of(dataset: Dataset, digests: Mapping[Path, str]) -> list[str]:
    """For each sample the name of its group: samples that share a prompt or a picture, directly
    or through others, are in one. An empty prompt joins nothing."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    keys = [_keys(sample, digests) for sample in dataset.samples]
    for first, *rest in keys:
        for other in rest:
            # The smaller name wins, so that the name does not depend on the order of the file.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return [root(first) for first, *_ in keys]


def _keys(sample: Sample, digests: Mapping[Path, str]) -> list[str]:
    pictures = [f"picture {digests[image]}" for image in sample.images]
    return pictures + ([f"prompt {sample.prompt}"] if sample.prompt else [])


def split(
    dataset: Dataset,
    digests: Mapping[Path, str],
    *,
    validation: float,
    test: float,
    seed: int = 0,
) -> Split:
    """Split by groups (see :func:`groups_of`) in the order of a hash of their names.

    Groups are dealt out until each part has its share of the samples; one that would overshoot
    it by more than half of it stays in training.

    Args:
        validation, test: shares of the samples, in [0, 1).

    Raises:
        SplitError: a part that should hold something would be empty, as when all samples hang
            together.
    """
    groups = groups_of(dataset, digests)
    sizes: dict[str, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    order = sorted(sizes, key=lambda g: (stable_seed("split", seed, g), g))
    where: dict[str, str] = {}
    for part, share in (("test", test), ("validation", validation)):
        wanted, got = share * len(dataset), 0
        for group in order:
            if got < wanted and group not in where and got + sizes[group] <= max(1.5 * wanted, 1):
                where[group] = part
                got += sizes[group]
        if share and not got:
            raise SplitError(_too_few(part, dataset, sizes))
    parts = {
        name: Dataset(
            dataset.kind,
            tuple(
                s
                for s, g in zip(dataset.samples, groups, strict=True)
                if where.get(g, "train") == name
            ),
        )
        for name in ("train", "validation", "test")
    }
    if not parts["train"]:
        raise SplitError(_too_few("train", dataset, sizes))
    return Split(**parts)


def _too_few(part: str, dataset: Dataset, sizes: Mapping[str, int]) -> str:
    return (
        f"no sample is left for {part}: the {len(dataset)} samples form {len(sizes)} groups that "
        f"share no prompt or picture, the largest of {max(sizes.values())}. Bring more prompts, "
        "change the shares, or give validation_data and test_data of your own"
    )


def refuse_overlap(train: Dataset, held_out: Dataset, digests: Mapping[Path, str]) -> None:
    """Refuse a held-out set that shares a prompt or a picture with training.

    Raises:
        SplitError: with the number of shared keys and an example.
    """
    seen = {key for sample in train.samples for key in _keys(sample, digests)}
    shared = sorted({k for s in held_out.samples for k in _keys(s, digests) if k in seen})
    if shared:
        raise SplitError(
            f"held-out data share {len(shared)} prompts or pictures with training, for example "
            f"{shared[0]!r}; remove them from one of the files"
        )
