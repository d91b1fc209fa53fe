"""Log-weights, resampling, and what moves with particles."""

from __future__ import annotations

import math

import pytest
import torch

from mmalign.registry import UnknownNameError
from mmalign.steering.particles import (
    Noise,
    Population,
    ancestors,
    effective_size,
    normalised,
    offspring,
    permute,
)

SCHEMES = ["systematic", "residual", "ssp", "multinomial"]
WEIGHTS = torch.tensor([0.05, 0.31, 0.0, 0.14, 0.25, 0.25], dtype=torch.float64)
LOGS = WEIGHTS.log() + 300.0  # far beyond what a float holds as a plain weight


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_and_effective_size():
    torch.testing.assert_close(normalised(LOGS), WEIGHTS, rtol=1e-9, atol=1e-12)
    assert float(effective_size(LOGS)) == pytest.approx(1 / float(WEIGHTS.square().sum()))
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, -math.inf], [-math.inf] * 3])
    assert effective_size(rows).tolist() == pytest.approx([3.0, 1.0, 0.0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_offspring_is_unbiased_and_within_its_bounds(scheme):
    expected = WEIGHTS * 6
    counts = torch.stack([offspring(LOGS, scheme, generator(s)) for s in range(1500)])
    assert (counts.sum(1) == 6).all() and (counts[:, 2] == 0).all()
    error = counts.double().std(0) / math.sqrt(len(counts))
    assert ((counts.double().mean(0) - expected).abs() <= 4 * error + 1e-9).all()
    if scheme != "multinomial":
        assert (counts >= torch.floor(expected)).all()
    if scheme in ("systematic", "ssp"):
        assert (counts <= torch.ceil(expected)).all()


def test_better_schemes_vary_less():
    spread = {
        scheme: float(
            torch.stack([offspring(LOGS, scheme, generator(s)) for s in range(300)])
            .double().var(0).sum()
        )
        for scheme in SCHEMES
    }  # fmt: skip
    assert max(spread["systematic"], spread["ssp"]) < spread["residual"] < spread["multinomial"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_and_constants_change_nothing(scheme):
    logs = torch.tensor([0.3, -1.0, 0.9, 0.1, -0.2], dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 2, 1])
    counts = offspring(logs, scheme, generator())
    assert offspring(logs[order], scheme, generator()).equal(counts[order])
    for seed in range(20):
        found = ancestors(logs, scheme, generator(seed))
        assert ancestors(logs + 17.5, scheme, generator(seed)).equal(found)
        moved = ancestors(logs[order], scheme, generator(seed))
        assert order[moved].equal(found[order])
        counts = offspring(logs, scheme, generator(seed))
        assert torch.bincount(found, minlength=5).equal(counts)
        alive = counts > 0
        assert found[alive].equal(torch.arange(5)[alive])  # survivors stay where they are


def test_equal_weights_keep_everybody():
    for scheme in ("systematic", "residual", "ssp"):
        assert ancestors(torch.zeros(7), scheme, generator()).tolist() == list(range(7))


def test_what_cannot_be_resampled():
    with pytest.raises(ValueError, match="every particle of a prompt is dropped"):
        offspring(torch.full((3,), -math.inf), "systematic", generator())
    with pytest.raises(UnknownNameError, match="'systematic'"):
        offspring(torch.zeros(3), "sistematic", generator())


def test_permute_moves_every_row_it_finds():
    rows = torch.tensor([2, 0, 0])
    x, table = torch.arange(6.0).view(3, 2), torch.arange(5)
    state = {"x": x, "ids": [torch.arange(3), (x, None)], "table": table, "name": "abc"}
    moved = permute(state, rows)
    assert moved["x"].equal(x[rows]) and moved["ids"][0].tolist() == [2, 0, 0]
    assert moved["ids"][1][0].equal(x[rows]) and moved["ids"][1][1] is None
    assert moved["table"] is table and moved["name"] == "abc"
    assert permute(x, torch.tensor([1]), batch=3).tolist() == [[2.0, 3.0]]


def test_prompts_never_exchange_particles():
    population = Population(["a", "b", "a"], 8, "test", 0)
    population.state["id"] = torch.arange(24)
    for _ in range(5):
        gains = torch.randn(24, generator=generator(1))
        gains[16:] = gains[:8]
        population.reweigh(gains * 3)
        population.resample()
    assert (population.state["id"] // 8).equal(torch.arange(3).repeat_interleave(8))
    # Equal prompts with equal weights have equal ancestors.
    assert (population.state["id"][16:] - 16).equal(population.state["id"][:8])


def test_weights_are_carried_until_the_effective_size_falls():
    population = Population(["a", "b"], 4)
    population.reweigh(torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0]))
    normaliser = population.log_normaliser
    places = population.resample(below=0.5)
    assert population.resampled.tolist() == [False, True]
    assert places.tolist() == [[0, 1, 2, 3], [1, 1, 1, 1]]
    assert population.log_weights.tolist() == [[0.0, 0.5, 0.0, 0.0], [0.0] * 4]
    torch.testing.assert_close(population.log_normaliser, normaliser)
    assert float(normaliser[0].exp()) == pytest.approx((3 + math.exp(0.5)) / 4)


def test_unscored_particles_are_dropped_but_never_all():
    population = Population(["a", "b"], 2)
    population.reweigh(torch.tensor([math.nan, 1.0, math.nan, math.nan]))
    assert population.log_weights.tolist() == [[-math.inf, 1.0], [0.0, 0.0]]
    assert population.resample(below=0.5).tolist() == [[1, 1], [0, 1]]


def test_keep_goes_on_with_some():
    population = Population(["a", "b"], 3)
    population.state["id"] = torch.arange(6)
    population.reweigh(torch.arange(6.0))
    assert population.keep(torch.tensor([[2], [0]])).tolist() == [2, 3]
    assert population.state["id"].tolist() == [2, 3] and population.each == 1
    assert population.log_weights.tolist() == [[2.0], [3.0]]


def test_noise_depends_on_the_row_alone():
    like = torch.zeros(3, 2, 2)
    together, alone = Noise([5, 6, 7]), Noise([6])
    for each in (None, 4, None):
        expected = alone.draw(like[:1], each)
        drawn = together.draw(like, each)
        assert drawn[1:2].equal(expected)
        assert drawn.shape == ((3, 2, 2) if each is None else (3, 4, 2, 2))
    together.keep(torch.tensor([1]))
    assert together.draw(like[:1]).equal(alone.draw(like[:1]))
