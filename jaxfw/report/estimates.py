"""Estimates with their 95 % intervals, from what a run measured."""

import numpy as np

from jaxfw.core.shapes import Float
from jaxfw.report.contents import Interval

Z = 1.96


def ratio_interval(sums: Float[np.ndarray, "N"], weights: Float[np.ndarray, "N"]) -> Interval:
    """Sum of `sums` over sum of `weights`, with its interval over N units by linearisation (Cochran 1977, 2.11).

    A mean over tokens, with windows of unequal numbers of them as units. Of one unit, the value alone.

    >>> ratio_interval(np.array([2.0, 4.0]), np.array([1.0, 1.0])).value
    3.0
    """
    total, N = max(float(weights.sum()), 1.0), len(sums)
    ratio = float(sums.sum()) / total
    residual = float(np.sum((sums - ratio * weights) ** 2)) * (N / (N - 1) if N > 1 else 0)
    half = Z * residual**0.5 / total
    return Interval(ratio, ratio - half, ratio + half)
