"""Branching rollouts: children of one state, a random one of which goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmalign.sampling import Plan, build_kernel, collect
from mmalign.sampling.branching import Families, whole_families
from mmalign.sampling.completion import complete
from mmalign.types import Rollout

PROMPTS = ["a photo of a red star"] * 3 + ["a photo of two circles"] * 3
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
SEEDS = [11, 12, 13, 14, 15, 16]


def plan(**changes) -> Plan:
    options = {"kernel": build_kernel("flow_sde"), "steps": 5, "guidance_scale": 1.0}
    return Plan(**{**options, "record": (0, 1, 2), "branch": True, **changes})


def sample(policy, plan: Plan, seeds=SEEDS, **options) -> Rollout:
    return collect(policy, PROMPTS, GROUPS, seeds, plan, **options)


def test_children_share_the_state_they_come_from(tiny_policy):
    rollout = sample(tiny_policy, plan())
    states, after = rollout.latents.reshape(2, 3, 3, -1), rollout.next_latents.reshape(2, 3, 3, -1)
    for family in range(2):
        for k in range(3):
            assert states[family, 1, k].equal(states[family, 0, k])
            assert not after[family, 1, k].equal(after[family, 0, k])
            if k < 2:  # one of the children goes on
                same = [after[family, i, k].equal(states[family, 0, k + 1]) for i in range(3)]
                assert sum(same) == 1
    assert not states[0, 0, 0].equal(states[1, 0, 0])
    ends = rollout.final.flatten(1)
    assert len(ends.unique(dim=0)) == 6  # past the last recorded step each goes on alone


def test_who_goes_on_is_random_and_reproducible():
    families = Families(torch.tensor([4] * 4 + [2] * 4), range(8))
    rows = torch.arange(8.0)
    drawn = torch.stack([families.go_on(rows)[[0, 4]] for _ in range(200)])
    again = Families(torch.tensor([4] * 4 + [2] * 4), range(8))
    assert torch.stack([again.go_on(rows)[[0, 4]] for _ in range(200)]).equal(drawn)
    counts = torch.stack([(drawn == i).sum(0) for i in range(8)])
    assert counts[:4, 1].sum() == counts[4:, 0].sum() == 0  # never a child of another family
    assert bool((counts[:4, 0] > 30).all() and (counts[4:, 1] > 30).all())
    assert not drawn[:, 0].equal(drawn[:, 1] - 4)


def test_noise_is_all_that_children_differ_in(tiny_policy):
    """A child alone, from the shared state and its own seed, is the child in the family."""
    first = sample(tiny_policy, plan(record=(1,)))
    alone = sample(tiny_policy, plan(record=(1,), branch=False), init_seeds=[11] * 3 + [14] * 3)
    assert alone.latents.equal(first.latents)
    for name in ("next_latents", "final", "log_probs"):  # the network saw two rows, and six
        assert (getattr(alone, name) - getattr(first, name)).abs().max() < 1e-5, name


def test_batches_do_not_matter_and_a_state_costs_one_call(tiny_policy):
    whole = sample(tiny_policy, plan())
    for size in (1, 4):
        parts = sample(tiny_policy, plan(), batch_size=size)
        assert (parts.latents - whole.latents).abs().max() < 1e-6
        assert parts.nfe == whole.nfe
    assert whole.nfe == 2 * 3 + 6 * 2  # two families for three steps, six samples for two
    window = sample(tiny_policy, plan(record=(2,)))
    assert window.nfe == 2 * 3 + 6 * 2
    assert whole_families(GROUPS, 4) == 3 and whole_families(GROUPS, 100) == 99


def test_children_are_completed_from_where_they_are(tiny_policy):
    rollout = sample(tiny_policy, plan())
    ends, nfe = complete(tiny_policy, rollout, range(3), steps=1, children=True, batch_size=5)
    assert nfe == 18
    for k in range(3):
        x, sigma = rollout.next_latents[:, k], rollout.sigmas[k + 1]
        with torch.no_grad():
            v = tiny_policy.predict(x, sigma, rollout.conditioning, 1.0)
        assert (ends[:, k] - (x - sigma * v)).abs().max() < 1e-5
    whole, _ = complete(tiny_policy, rollout, (2,), children=True)
    assert (whole[:, 0] - rollout.final).abs().max() < 1e-5
    apart = replace(rollout, steps=(0, 2, 3))  # steps need not be consecutive for children
    assert complete(tiny_policy, apart, (1,), steps=1, children=True)[1] == 6


def test_families_must_be_whole(tiny_policy):
    with pytest.raises(ValueError, match=r"side by side.*\[0, 1, 0\]"):
        Families(torch.tensor([0, 1, 0]), [1, 2, 3])
    with pytest.raises(ValueError, match="as many of each"):
        Families(torch.tensor([0, 0, 1]), [1, 2, 3])
    with pytest.raises(ValueError, match="must record steps"):
        plan(record=(), noisy=())
