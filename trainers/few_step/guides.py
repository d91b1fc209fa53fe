"""The recipe's reward as a function of clean latents, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmalign.config import ConfigError
from mmalign.sampling.decoding import Clamp, check_clamp
from trainers.companion import Setting
from trainers.gradient.judge import judged
from trainers.gradient.objective import RewardGradient
from trainers.gradient.start import check_differentiable
from trainers.probe import Probe


class PixelGuide:
    """Decodes latents and has the recipe's reward judge the pictures; it learns nothing.

    Raises:
        ConfigError: a reward without gradient, or a clamp that the policy does not let undo.
    """

    nfe = 0

    def __init__(self, clamp: Clamp, setting: Setting) -> None:
        check_differentiable(setting.reward, "objective.through 'pixels'")
        try:
            check_clamp(setting.policy, clamp)
        except ValueError as error:
            raise ConfigError(f"objective.{error}") from error
        self.setting = setting
        self.rule = RewardGradient(clamp=clamp)

    def reward(self, latents: Tensor, probe: Probe) -> Tensor:
        """The reward of each, ``(b,)``, 0 where unscored; its gradient goes to ``latents``."""
        policy, reward = self.setting.policy, self.setting.reward
        verdict = judged(policy, reward, self.rule, latents, probe.prompts)
        # The gradient was taken apart from this graph: a term that is 0 carries it over.
        carried = (verdict.gradient * (latents - latents.detach())).flatten(1).sum(1)
        return -(verdict.loss + carried)

    def show(self, pictures: Sequence[Tensor], probe: Probe) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """Nothing was kept."""

    def learn(self) -> dict[str, float]:
        """Nothing is learned."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is to be saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""
