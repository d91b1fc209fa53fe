"""The benchmark's numbers: their structure, that they are positive, and how FLOPs are counted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mmalign.commands.bench import summary
from mmalign.config import ConfigError
from mmalign.policies.architectures import ARCHITECTURES
from mmalign.policies.random_init import load_random
from mmalign.registry import UnknownNameError
from mmalign.runtime.measure import count_flops, cpu_threads, timed
from trainers.bench import bench

DIALS = {"device": "cpu", "dtype": "fp32", "batch_size": 2, "images": 2, "steps": 3, "repeats": 2}
STAGES = ["encode", "network", "rollout", "decode", "reward", "update"]


@pytest.fixture(autouse=True)
def small_matrix(monkeypatch):
    monkeypatch.setattr("mmalign.runtime.measure.MATMUL_SIDE", {"cpu": 128})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both kinds of policy, measured once; with the file that was written."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmalign.runtime.measure.MATMUL_SIDE", {"cpu": 128})
        return {
            name: (bench(name, out=folder / "deep" / f"{i}.json", **DIALS, **more),
                   folder / "deep" / f"{i}.json")
            for i, (name, more) in enumerate(
                (("tiny-sd3", {"adapter": "full", "kl_beta": 0.1}),
                 ("random:sd3-tiny", {"lora_rank": 4, "size": 32, "guidance_scale": 1.0})))
        }  # fmt: skip


@pytest.mark.parametrize("name", ["tiny-sd3", "random:sd3-tiny"])
def test_structure(measured, name):
    result, path = measured[name]
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["policy"] == name and list(result["stages"]) == STAGES
    for stage in filter(None, result["stages"].values()):
        assert stage["work"].keys() == stage["per_second"].keys()
        for spread in (stage["seconds"], *stage["per_second"].values()):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"] < math.inf
    for part in ("network", "rollout", "update"):
        stage = result["stages"][part]
        assert stage["tflops"] > 0 and stage["share_of_matmul"] > 0
    for count in (*result["parameters"].values(), result["matmul"]["tflops"]):
        assert count > 0
    assert result["step"]["images_per_second"] > 0
    assert all(v > 0 for k, v in result["memory"].items() if k.endswith("bytes"))
    assert result["environment"]["packages"]["torch"]


def test_what_was_counted(measured):
    guided, _ = measured["tiny-sd3"]
    plain, _ = measured["random:sd3-tiny"]
    assert guided["stages"]["encode"]["work"] == {"prompts": 2}
    assert plain["stages"]["encode"] is None
    assert guided["stages"]["rollout"]["work"] == {"images": 2, "network_evaluations": 12}
    assert plain["stages"]["rollout"]["work"] == {"images": 2, "network_evaluations": 6}
    assert plain["stages"]["update"]["work"] == {"samples": 2, "sample_steps": 4}
    assert plain["settings"]["height"] == plain["settings"]["width"] == 32
    assert guided["settings"]["guidance_scale"] > 1 and guided["settings"]["weights"] == "float32"
    assert plain["parameters"]["trainable"] < plain["parameters"]["denoiser"]


def test_update_flops_follow_from_the_network(measured):
    """Full fine-tuning with a reference: forward twice, backward at twice the forward's cost."""

    def ratio(name):
        stages = measured[name][0]["stages"]
        one = stages["network"]["gflop_per_network_evaluation"]
        return stages["update"]["gflop_per_sample_step"] / one

    assert 3.5 < ratio("tiny-sd3") / 2 < 4.1  # two evaluations a sample: guidance
    assert 1.5 < ratio("random:sd3-tiny") < 3.1


def test_table(measured):
    text = summary(measured["random:sd3-tiny"][0])
    for word in ("random:sd3-tiny", "sample steps", "images/s", "peak memory", "matrix product"):
        assert word in text


def test_flops_of_attention_are_counted():
    q = torch.randn(1, 2, 5, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(q, q, q)) == 2 * (2 * 2 * 5 * 5 * 4)


def test_timed_leaves_the_warm_up_out():
    calls = []
    assert len(timed(lambda: calls.append(1), 3, torch.device("cpu"))) == 3
    assert len(calls) == 4


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repeat": 1}, "repeats"),
        ({"repeats": 0}, "at least 1"),
        ({"images": 1}, "at least 2"),
        ({"adapter": "none"}, "'lora', 'full'"),
        ({"size": 20}, "multiple of 16"),
    ],
)
def test_unusable_options(options, said):
    with pytest.raises(ConfigError, match=said):
        bench("tiny-sd3", **{**DIALS, **options})


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"random:sd3\.5-medium"):
        load_random("random:sd3.5-mediun")


class TestRandomPolicy:
    """Random weights on the spot, embeddings from the prompt's text."""

    @pytest.fixture(scope="class")
    def policy(self):
        return load_random("random:sd3-tiny", dtype=torch.bfloat16)

    def test_precision_and_state(self, policy):
        assert {p.dtype for p in policy.denoiser.parameters()} == {torch.bfloat16}
        assert torch.get_default_dtype() == torch.float32

    def test_embeddings_depend_on_the_prompt_alone(self, policy):
        both, one = policy.encode(["a", "b"]), policy.encode(["b"])
        assert both.positive["embeds"].shape == (2, 12, 32)
        assert both.positive["pooled"].shape == (2, 32)
        assert both.positive["embeds"][1].equal(one.positive["embeds"][0])
        assert not both.positive["embeds"][0].equal(both.positive["embeds"][1])
        assert both.negative["embeds"][0].equal(both.negative["embeds"][1])

    def test_seed_decides_the_weights(self, policy):
        same, other = (load_random("random:sd3-tiny", seed=s).denoiser for s in (0, 1))
        name = "transformer_blocks.0.attn.to_q.weight"
        assert not same.get_parameter(name).equal(other.get_parameter(name))

    def test_published_sizes(self):
        """Parameter count of the published transformer, made without memory."""
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            model = SD3Transformer2DModel(**ARCHITECTURES["sd3.5-medium"].network)
        count = sum(p.numel() for p in model.parameters())
        assert 2.2e9 < count < 2.6e9
