"""Metrics of rewards and judges: small pure functions, each with its definition.

* :mod:`~eval.metrics.pairs`: pair accuracy in its four variants, inversion score, ACC+.
* :mod:`~eval.metrics.correlation`: SRCC, PLCC (optionally after a logistic fit), KRCC.
* :mod:`~eval.metrics.selection`: best of N, win rate, votes in four classes.
* :mod:`~eval.metrics.agreement`: consistency under a swap of positions, calibration error.
* :mod:`~eval.metrics.resampling`: cluster bootstrap of any statistic, paired permutation test.
"""
