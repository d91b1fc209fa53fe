"""What the tests of gradient methods share."""

from __future__ import annotations

import pytest
from redness import redness

from vision_rewards.function import FunctionReward


@pytest.fixture
def reward():
    return FunctionReward(redness, takes="tensor", differentiable=True)
