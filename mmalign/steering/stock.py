"""The steered scheduler: between the steps of any stock pipeline, without rewriting it.

A pipeline calls ``scheduler.step(noise_pred, t, latents)`` once a step, with the guided prediction.
:func:`steered` replaces the scheduler for the length of a ``with`` block by an instance of a
subclass of its own class that overrides only ``step``.  A :class:`Controller` sees every step and
may reorder the samples, before the step (their clean estimates cost nothing there) or after it;
what the solver remembers of each sample moves with it.  The step is the scheduler's own, or that of
one of the suite's kernels with a random generator for each sample.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmalign.protocols import Kernel, Parameterisation
from mmalign.sampling.fit import fitted
from mmalign.sampling.process import split
from mmalign.steering.fk import last_kernel
from mmalign.steering.levels import canonical, level, parameterisation, step_index
from mmalign.steering.particles import Noise, permute


@dataclass
class StepState:
    """One step of the pipeline, ``B`` samples at once.

    Attributes:
        index, steps: number of the step, from 0, and how many there are.
        timestep: as the pipeline gave it.
        sigma, sigma_next: noise levels before and after, in the suite's terms.
        x: ``(B, ...)`` the state before, in the scheduler's own scale.
        prediction: ``(B, ...)`` the network's output, guided.
        x_next: the state after; ``None`` before the step. A controller may put another here.
    """

    index: int
    steps: int
    timestep: Any
    sigma: Tensor
    sigma_next: Tensor
    x: Tensor
    prediction: Tensor
    scheduler: Any = field(repr=False)
    x_next: Tensor | None = None

    @property
    def parameterisation(self) -> Parameterisation:
        """What :attr:`canonical` predictions are."""
        return parameterisation(self.scheduler)

    @property
    def canonical(self) -> tuple[Tensor, Tensor]:
        """State and prediction in the suite's terms, fp32."""
        _, scale = level(self.scheduler, self.index)
        x = self.x.float() / scale.to(self.x.device, torch.float32)
        return x, canonical(self.scheduler, x, self.sigma, self.prediction.float())

    @property
    def estimates(self) -> tuple[Tensor, Tensor]:
        """Clean sample and noise that the prediction stands for, ``(B, ...)`` fp32."""
        x, prediction = self.canonical
        return split(self.parameterisation, x, self.sigma, prediction)


class Controller:
    """Sees every step; the base class changes nothing.

    Both methods return ``None``, or ``(B,)`` row numbers: row ``i`` goes on with what row
    ``rows[i]`` had.
    """

    def before(self, state: StepState) -> Tensor | None:
        """Before the step: reorders states, predictions and the solver's memory."""
        return None

    def after(self, state: StepState) -> Tensor | None:
        """After the step: reorders the new states and the solver's memory."""
        return None


@dataclass
class _Steering:
    controller: Controller
    kernel: Kernel | None
    noise: Noise | None
    index: int = -1


@contextmanager
def steered(
    pipe: Any,
    controller: Controller | None = None,
    *,
    kernel: Kernel | None = None,
    seeds: Sequence[int] | None = None,
    expose: Sequence[str] = (),
) -> Iterator[Any]:
    """Steer every call of ``pipe`` inside the block; the pipeline is restored after it.

    Without a controller and a kernel the pipeline's output is what it always is, bit for bit.

    Args:
        pipe: any diffusers pipeline whose loop calls ``scheduler.step``.
        controller: sees every step.
        kernel: replaces the scheduler's own step; see :mod:`mmalign.sampling.fit` for those that
            fit flow and diffusion models.
        seeds: of the kernel's noise, one for each row of the batch (prompts times images each).
        expose: further local names of the pipeline's loop that ``callback_on_step_end`` may ask
            for, such as ``noise_pred``.

    Yields:
        The steered scheduler.

    Raises:
        ValueError: a pipeline that is steered already, a scheduler that takes several network
            calls a step together with a kernel, a kernel that does not fit, or a stochastic one
            without seeds.
    """
    original = pipe.scheduler
    if hasattr(original, "_steering"):
        raise ValueError("this pipeline is being steered already; leave the other block first")
    if kernel is not None:
        kernel = _checked(kernel, original, seeds)
    scheduler = copy.deepcopy(original)
    kind: Any = type(original)
    scheduler.__class__ = _subclass(kind)
    noise = None if seeds is None else Noise(seeds)
    scheduler._steering = _Steering(controller or Controller(), kernel, noise)
    pipe.scheduler = scheduler
    if expose:
        pipe._callback_tensor_inputs = [*type(pipe)._callback_tensor_inputs, *expose]
    try:
        yield scheduler
    finally:
        pipe.scheduler = original
        if expose:
            del pipe._callback_tensor_inputs


def _checked(kernel: Kernel, scheduler: Any, seeds: Sequence[int] | None) -> Kernel:
    name = type(scheduler).__name__
    known: Any = SimpleNamespace(parameterisation=parameterisation(scheduler), name=name)
    kernel = fitted(kernel, known)
    if scheduler.order != 1:
        raise ValueError(
            f"{name} calls the network {scheduler.order} times a step, which no kernel replaces; "
            "use a scheduler of order 1, such as DDIM, Euler or DPM++ multistep"
        )
    if kernel.stochastic and seeds is None:
        raise ValueError("a stochastic kernel needs seeds, one for each row of the batch")
    return kernel


@functools.cache
def _subclass(cls: Any) -> type:
    """``cls`` with a steered ``step``; name, module and signature stay, as pipelines look at them
    and at saving write them down."""
    native = cls.step

    @functools.wraps(native)
    def step(
        self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *a: Any, **k: Any
    ) -> Any:
        return _step(self, native, model_output, timestep, sample, a, k)

    step.__signature__ = inspect.signature(native)  # type: ignore[attr-defined]
    body = {"step": step, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _step(
    scheduler: Any, native: Any, output: Tensor, timestep: Any, sample: Tensor, a: Any, k: Any
) -> Any:
    steering: _Steering = scheduler._steering
    index = steering.index = step_index(scheduler, timestep, steering.index)
    state = StepState(
        index, len(scheduler.timesteps), timestep, level(scheduler, index)[0],
        level(scheduler, index + 1)[0], sample, output, scheduler,
    )  # fmt: skip
    rows = steering.controller.before(state)
    if rows is not None:
        state.x, state.prediction = permute(state.x, rows), permute(state.prediction, rows)
        move_memory(scheduler, rows)
    # The native step keeps the books (its index, its memory, what it returns) in any case.
    result = native(scheduler, state.prediction, timestep, state.x, *a, **k)
    plain = type(result) is tuple
    reached = result[0] if plain else result.prev_sample
    if steering.kernel is not None:
        reached = _moved(steering, state).to(reached.dtype)
    state.x_next = reached
    rows = steering.controller.after(state)
    if rows is not None:
        state.x_next = permute(state.x_next, rows)
        result = permute(result, rows) if plain else _permuted_output(result, rows)
        move_memory(scheduler, rows)
    if plain:
        return (state.x_next, *result[1:])
    result.prev_sample = state.x_next
    return result


def _permuted_output(output: Any, rows: Tensor) -> Any:
    """A scheduler's output class with its other fields (clean estimates) reordered too."""
    for name, value in output.items():
        setattr(output, name, permute(value, rows))
    return output


def _moved(steering: _Steering, state: StepState) -> Tensor:
    """The state after a step of the suite's kernel, in the scheduler's scale."""
    assert steering.kernel is not None
    kernel, (x, prediction) = steering.kernel, state.canonical
    if state.index == state.steps - 1:
        kernel = last_kernel(kernel, state.parameterisation)
    noise = None if steering.noise is None else steering.noise.draw(x)
    step = kernel.step(x, state.sigma, state.sigma_next, prediction, noise)
    _, scale = level(state.scheduler, state.index + 1)
    return step.x_next * scale.to(x.device, torch.float32)


def move_memory(scheduler: Any, rows: Tensor) -> None:
    """Reorder what a solver remembers of each sample: every tensor ``(B, ...)`` it holds, alone or
    in a list. Tables have one dimension and are left alone."""
    for name, value in list(vars(scheduler).items()):
        if isinstance(value, Tensor) and value.ndim > 1:
            setattr(scheduler, name, permute(value, rows))
        elif isinstance(value, list):
            moved = [permute(v, rows) if isinstance(v, Tensor) and v.ndim > 1 else v for v in value]
            setattr(scheduler, name, moved)


__all__ = ["Controller", "StepState", "move_memory", "steered"]
