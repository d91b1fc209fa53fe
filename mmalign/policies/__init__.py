"""Policies: model families seen as network, schedule and codec, over stock diffusers pipelines."""
