"""The steered scheduler on tiny stock pipelines: nothing changes that should not."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from mmalign.policies.build import tiny_pipeline
from mmalign.policies.tiny import tiny_flux, tiny_sd, tiny_sdxl, tiny_wan
from mmalign.sampling import CpsKernel, DdimKernel, FlowSdeKernel, KernelMismatchError, OdeKernel
from mmalign.steering.levels import level
from mmalign.steering.stock import Controller, steered

WAN = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
CALLS = {
    "sd": (tiny_sd, {"guidance_scale": 3.0}),
    "sdxl": (tiny_sdxl, {"guidance_scale": 3.0}),
    "sd3": (tiny_pipeline, {"guidance_scale": 3.0, "max_sequence_length": 0}),
    "flux": (tiny_flux, {"guidance_scale": 3.0, "max_sequence_length": 16}),
    "wan": (tiny_wan, {"guidance_scale": 3.0, **WAN}),
}
STEPS, EACH = 5, 3
ORDER = torch.tensor([2, 0, 1])


@cache
def built(name: str):
    pipe = CALLS[name][0]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=CALLS)
def name(request):
    return request.param


def flow_wan():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def diffusion(kind, **options):
    return kind.from_config(built("sd").scheduler.config, **options)


def sample(name: str, scheduler=None, prompts=("red star",), each: int = EACH, **more):
    """Latents of the pipeline's own call, with a generator for each row."""
    pipe = built(name)
    if scheduler is not None:
        pipe.scheduler = scheduler
    count = "num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"
    rows = [torch.Generator().manual_seed(i) for i in range(each * len(prompts))]
    own = {"num_inference_steps": STEPS, "generator": rows, count: each, **CALLS[name][1], **more}
    return pipe(list(prompts), output_type="latent", return_dict=False, **own)[0]


class Permute(Controller):
    """Reorders once, and records what it saw."""

    def __init__(self, at: int, when: str = "before", order: torch.Tensor = ORDER) -> None:
        self.at, self.when, self.order, self.seen = at, when, order, []

    def before(self, state):
        self.seen.append(state)
        return self.order if self.when == "before" and state.index == self.at else None

    def after(self, state):
        return self.order if self.when == "after" and state.index == self.at else None


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -- every family ------------------------------------------------------------------------------


def test_a_transparent_scheduler_changes_no_bit(name):
    stock = sample(name)
    with steered(built(name)) as scheduler:
        assert sample(name).equal(stock)
        assert type(scheduler).__name__ == type(scheduler).__mro__[1].__name__
    assert sample(name).equal(stock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_reordering_samples_reorders_the_result(name, when):
    stock = sample(name)
    with steered(built(name), Permute(2, when)):
        assert sample(name).equal(stock[ORDER])


def test_the_prediction_is_guided_and_estimates_are_right(name):
    """One row for each sample, and ``x = a x0 + b eps`` at every step."""
    with steered(built(name), controller := Permute(-1)):
        final = sample(name)
    assert [s.index for s in controller.seen] == list(range(STEPS))
    assert {s.steps for s in controller.seen} == {STEPS}
    for state in controller.seen:
        assert len(state.prediction) == EACH
        (x, _), (clean, noise) = state.canonical, state.estimates
        sigma = state.sigma.float()
        flow = state.parameterisation == "flow"
        a = 1 - sigma if flow else (1 - sigma.square()).sqrt()
        torch.testing.assert_close(a * clean + sigma * noise, x, rtol=1e-4, atol=1e-4)
    last = controller.seen[-1]
    if name in ("sd3", "flux", "wan"):  # ends at sigma 0: the last estimate is the result
        same(last.estimates[0], final.float())
    assert final.shape == last.x.shape


def test_kernels_need_no_change_of_the_pipeline(name):
    """The deterministic kernel of each kind is the stock sampler, through the same classes."""
    flow = name in ("sd3", "flux", "wan")
    own = flow_wan() if name == "wan" else None
    before = built(name).scheduler
    try:
        stock = sample(name, own)
        with steered(built(name), kernel=OdeKernel() if flow else DdimKernel(eta=0.0)):
            found = sample(name)
    finally:
        built(name).scheduler = before
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)


def test_two_prompts_never_mix(name):
    """Reordering within each prompt is each prompt's own reordering."""
    prompts, each = ("red star", "a circle"), 2
    within = torch.tensor([1, 1, 2, 2])
    seeds = list(range(4))
    kernel = CpsKernel() if name in ("sd3", "flux", "wan") else DdimKernel()
    with steered(built(name), Permute(2, order=within), kernel=kernel, seeds=seeds):
        both = sample(name, prompts=prompts, each=each)
    with steered(built(name), Permute(2, order=within[:2]), kernel=kernel, seeds=seeds[:2]):
        alone = sample(name, prompts=prompts[:1], each=each)
    torch.testing.assert_close(both[:2], alone, rtol=1e-4, atol=1e-4)
    assert not both[:1].allclose(both[1:2]) and not both[2:3].allclose(both[3:])


def test_noise_belongs_to_rows(name):
    kernel = CpsKernel() if name in ("sd3", "flux", "wan") else DdimKernel()
    with steered(built(name), kernel=kernel, seeds=[7, 8, 9]):
        first, again = sample(name), None
    with steered(built(name), kernel=kernel, seeds=[7, 8, 9]):
        again = sample(name)
    with steered(built(name), kernel=kernel, seeds=[7, 8, 10]):
        other = sample(name)
    assert again.equal(first)
    same(other[:2], first[:2])
    assert not other[2:].allclose(first[2:])


def test_the_pipeline_is_restored_after_an_exception(name):
    pipe = built(name)
    scheduler, config = pipe.scheduler, dict(pipe.config)

    class Broken(Controller):
        def after(self, state):
            raise RuntimeError("broken on purpose")

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        steered(pipe, Broken(), expose=["noise_pred"]),
    ):
        sample(name)
    assert pipe.scheduler is scheduler and dict(pipe.config) == config
    assert "_callback_tensor_inputs" not in vars(pipe)


def test_callbacks_may_ask_for_the_guided_prediction(name):
    seen = []

    def look(pipe, index, time, tensors):
        seen.append(tensors["noise_pred"].shape)
        return {}

    options = {
        "callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["noise_pred"],
    }  # fmt: skip
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        sample(name, **options)
    with steered(built(name), expose=["noise_pred"]):
        latents = sample(name, **options)
    assert seen == [latents.shape] * STEPS


# -- every solver ------------------------------------------------------------------------------

SOLVERS = {
    "dpm++": lambda: diffusion(DPMSolverMultistepScheduler),
    "dpm++3": lambda: diffusion(DPMSolverMultistepScheduler, solver_order=3),
    "dpm++sde": lambda: diffusion(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: diffusion(UniPCMultistepScheduler),
    "deis": lambda: diffusion(DEISMultistepScheduler),
    "pndm": lambda: diffusion(PNDMScheduler, skip_prk_steps=True),
    "euler": lambda: diffusion(EulerDiscreteScheduler),
    "heun": lambda: diffusion(HeunDiscreteScheduler),
    "ddpm": lambda: diffusion(DDPMScheduler),
    "lcm": lambda: diffusion(LCMScheduler),
    "euler-a": lambda: diffusion(EulerAncestralDiscreteScheduler),
}
NOISY = ("ddpm", "lcm", "euler-a", "dpm++sde")


@pytest.fixture(params=SOLVERS)
def solver(request):
    before = built("sd").scheduler
    yield request.param
    built("sd").scheduler = before


def test_what_a_solver_remembers_moves_along(solver):
    stock = sample("sd", SOLVERS[solver]())
    with steered(built("sd")) as scheduler:
        assert sample("sd").equal(stock)
        assert inspect.signature(scheduler.step) == inspect.signature(SOLVERS[solver]().step)
    for when in ("before", "after"):
        with steered(built("sd"), Permute(2, when)):
            found = sample("sd")
        if solver in NOISY:  # generators stay in their places, so rows part ways from there
            assert not found.equal(stock[ORDER]) and torch.isfinite(found).all()
        else:
            assert found.equal(stock[ORDER])


def test_without_its_memory_a_solver_goes_astray(monkeypatch):
    """What the move of the memory is for: the same test fails without it."""
    from mmalign.steering import stock as module

    before = built("sd").scheduler
    try:
        stock = sample("sd", SOLVERS["dpm++"]())
        monkeypatch.setattr(module, "move_memory", lambda scheduler, rows: None)
        with steered(built("sd"), Permute(3)):
            assert (sample("sd") - stock[ORDER]).abs().max() > 1e-3
    finally:
        built("sd").scheduler = before


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_levels_agree_with_the_solvers_own_estimate(prediction):
    """x0 from the tables equals what DDIM and Euler call ``pred_original_sample``."""
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, 4, 4, 4, generator=generator)
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        holder = type("Holder", (), {})()
        holder.scheduler = diffusion(kind, prediction_type=prediction)
        holder.scheduler.set_timesteps(STEPS)
        with steered(holder, controller := Permute(-1)) as scheduler:
            for t in scheduler.timesteps[:3]:
                scheduler.scale_model_input(x, t)
                found = scheduler.step(output, t, x)
                clean, _ = controller.seen[-1].estimates
                torch.testing.assert_close(found.pred_original_sample, clean, rtol=1e-3, atol=1e-3)


def test_the_ode_of_euler_is_ddim_in_other_coordinates():
    """A DDIM kernel on an Euler scheduler's table: same x0, other scale, same picture."""
    before = built("sd").scheduler
    try:
        stock = sample("sd", SOLVERS["euler"](), num_inference_steps=30)
        with steered(built("sd"), kernel=DdimKernel(eta=0.0)):
            found = sample("sd", num_inference_steps=30)
        torch.testing.assert_close(found, stock, rtol=2e-3, atol=2e-3)
        final, scale = level(built("sd").scheduler, 30)
        assert float(final) == 0 and float(scale) == 1
    finally:
        built("sd").scheduler = before


# -- what cannot be steered --------------------------------------------------------------------


def test_wrong_combinations_are_explained():
    pipe = built("sd3")
    with pytest.raises(KernelMismatchError, match=r"kernels that fit: .*cps"):
        steered(pipe, kernel=DdimKernel()).__enter__()
    with pytest.raises(ValueError, match="needs seeds"):
        steered(pipe, kernel=FlowSdeKernel()).__enter__()
    with steered(pipe), pytest.raises(ValueError, match="steered already"):
        steered(pipe).__enter__()
    holder = type("Holder", (), {})()
    holder.scheduler = SOLVERS["heun"]()
    with pytest.raises(ValueError, match="2 times a step"):
        steered(holder, kernel=DdimKernel(eta=0.0)).__enter__()
    assert "_steering" not in vars(pipe.scheduler)
