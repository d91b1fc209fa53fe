"""Seeds, devices, attention back-ends, provenance."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from mmalign.registry import UnknownNameError
from mmalign.runtime.device import BackendError, pick_device, pick_dtype, set_attention_backend
from mmalign.runtime.seeds import seed_all, stable_seed
from mmalign.runtime.versions import environment


def test_stable_seed_is_the_same_everywhere():
    assert stable_seed("eval", "a cat", 3) == 5991330970083861866
    assert stable_seed("a", "b") != stable_seed("ab") != stable_seed("a", "b", 0)
    assert stable_seed(1) != stable_seed("1")
    assert stable_seed(np.int64(3), torch.tensor(4)) == stable_seed(3, 4)
    assert all(0 <= stable_seed(i) < 2**63 for i in range(200))
    with pytest.raises(TypeError, match="got object"):
        stable_seed(object())


def test_seed_all_repeats_every_source():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_all(3)
    first = draw()
    seed_all(3)
    assert draw() == first
    seed_all(4)
    assert draw() != first


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(UnknownNameError, match="Did you mean 'cuda'"):
        pick_device("cudda")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"device 'cuda'.*use 'auto'"):
            pick_device("cuda")


def test_dtypes():
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) is torch.float32
    assert pick_dtype("bf16", cpu) is torch.bfloat16
    with pytest.raises(BackendError, match="fp16"):
        pick_dtype("fp16", cpu)
    with pytest.raises(UnknownNameError, match="Did you mean 'fp32'"):
        pick_dtype("fp23", cpu)


def _tiny_sd3():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip


def _run(model):
    inputs = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=inputs)
    words = torch.randn(2, 3, 16, generator=inputs)
    return model(latents, words, words[:, 0], torch.tensor([500.0, 20.0])).sample


@pytest.fixture
def restore_backend():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as backends

    active = backends._active_backend
    yield
    backends._active_backend = active


def test_attention_backend_reaches_processors_that_diffusers_skips(restore_backend, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    model = _tiny_sd3()
    before = _run(model)
    assert set_attention_backend(model, "_native_math") == 2
    calls = []
    math = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName._NATIVE_MATH]

    def counted(*args, **kwargs):
        calls.append(1)
        return math(*args, **kwargs)

    registry = dispatch._AttentionBackendRegistry._backends
    monkeypatch.setitem(registry, dispatch.AttentionBackendName._NATIVE_MATH, counted)
    after = _run(model)
    assert len(calls) == 2  # one a layer: the back-end is used, not only recorded
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    after.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "to_q" in n)
    set_attention_backend(model, "native")
    assert torch.equal(_run(model), before)
    assert len(calls) == 2


@pytest.mark.parametrize("autocast", [True, False])
def test_quick_math_attention_is_attention_but_for_the_rounding(autocast):
    """Values and gradients in bf16; under autocast of fp32 too, as behind a norm."""
    from mmalign.runtime.device import _attention, _plain

    q, k, v, back = torch.randn(4, 3, 2, 11, 24, generator=torch.Generator().manual_seed(0))
    factors = [(t if autocast else t.bfloat16()).requires_grad_() for t in (q, k)]
    factors.append(v.bfloat16().requires_grad_())
    plain = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert _plain(tuple(factors), plain)
        out = _attention(*factors)
    assert out.dtype == torch.bfloat16
    exact = [f.detach().bfloat16().double().requires_grad_() for f in factors]
    right = (exact[0] @ exact[1].transpose(-2, -1) / 24**0.5).softmax(-1) @ exact[2]
    one = [out, *torch.autograd.grad(out, factors, back.bfloat16())]
    two = [right, *torch.autograd.grad(right, exact, back.bfloat16().double())]
    for rounded, wanted in zip(one, two, strict=True):
        assert (rounded.double() - wanted).norm() < 0.01 * wanted.norm()
    rows = [_attention(*(f[n : n + 1] for f in factors)) for n in range(3)]
    assert torch.cat(rows).equal(out)  # a row is the same in any batch
    for asked in ({"attn_mask": torch.ones(11, 11)}, {"is_causal": True}, {"scale": 0.5}):
        assert not _plain(tuple(factors), asked)
    assert not _plain((q, k, v), {}) and not _plain((*factors, None), {})


def test_native_leaves_the_model_alone(restore_backend):
    model = _tiny_sd3()
    kinds = [type(m.processor) for m in model.modules() if hasattr(m, "processor")]
    set_attention_backend(model, "native")
    assert kinds == [type(m.processor) for m in model.modules() if hasattr(m, "processor")]


@pytest.mark.parametrize("name", ["xformers", "flash", "sage"])
def test_missing_backend_says_what_to_install(name):
    from importlib.util import find_spec

    package = {"flash": "flash_attn", "sage": "sageattention"}.get(name, name)
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(BackendError, match=f"'{name}' is not available.*install"):
        set_attention_backend(_tiny_sd3(), name)


def test_installed_backend_without_a_gpu_is_refused(monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda backend: None)
    with pytest.raises(BackendError, match=r"'flash' needs a CUDA GPU.*use 'native'"):
        set_attention_backend(_tiny_sd3(), "flash")


def test_unknown_backend_and_unfit_model():
    with pytest.raises(UnknownNameError, match="Did you mean 'xformers'"):
        set_attention_backend(_tiny_sd3(), "xformer")
    with pytest.raises(BackendError, match="Linear offers no choice"):
        set_attention_backend(torch.nn.Linear(1, 1), "native")


def test_environment_is_plain_data():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] and found["threads"] >= 1 and found["cores"] >= 1
