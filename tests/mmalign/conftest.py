"""A tiny stock pipeline, made once, for every test that needs a network."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny_policy():
    """Policy over a random 32-pixel SD3 pipeline without the zero tokens in T5's place."""
    from mmalign.policies.build import tiny_pipeline
    from mmalign.policies.sd3 import SD3Policy

    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return SD3Policy(pipeline, name="tiny", max_sequence_length=0)
