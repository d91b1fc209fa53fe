"""Benchmarks of rewards and judges: who prefers what people prefer, and where.

A benchmark (:mod:`~eval.reward_benchmarks.base`) reads items: a prompt, what was made of it, and
what people said of it. :mod:`~eval.reward_benchmarks.scoring` asks a reward about each picture
once, :mod:`~eval.reward_benchmarks.measures` turns the answers into numbers with intervals, and
:mod:`~eval.reward_benchmarks.run` does that for several rewards and ranks them.
"""
