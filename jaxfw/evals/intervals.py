"""How sure an accuracy is, and a difference of two systems on the same items: 95 % intervals."""

import numpy as np
from scipy import stats

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float
from jaxfw.report.contents import Interval

RESAMPLES = 10_000


def wilson(correct: int, n: int) -> Interval:
    """A share with Wilson's score interval (Wilson 1927), without continuity correction.

    Raises:
        InputError: there is no item, or more are right than there are.

    >>> found = wilson(9, 10)
    >>> round(found.low, 3), round(found.high, 3)
    (0.596, 0.982)
    """
    if n < 1 or not 0 <= correct <= n:
        raise InputError(f"correct={correct} of n={n}: a share needs at least one item, and 0 <= correct <= n.")
    bounds = stats.binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(correct / n, float(bounds.low), float(bounds.high))


def paired_difference(
    one: Float[np.ndarray, "N"], other: Float[np.ndarray, "N"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean of `other - one` over the same N items, with the percentile bootstrap over items (Efron 1979).

    Pairing removes what makes items hard for both, so a difference shows that two separate intervals would hide.

    Raises:
        InputError: the systems answered different numbers of items, or none.
    """
    if one.shape != other.shape or one.ndim != 1 or not one.size:
        raise InputError(f"scores of shapes {one.shape} and {other.shape}: give one each for the same items.")
    difference = np.asarray(other, np.float64) - np.asarray(one, np.float64)
    values, counts = np.unique(difference, return_counts=True)
    # Drawing N items with replacement is one multinomial draw over their distinct differences.
    drawn = np.random.default_rng(seed).multinomial(difference.size, counts / difference.size, resamples)
    low, high = np.quantile(drawn @ values / difference.size, [0.025, 0.975])
    return Interval(float(difference.mean()), float(low), float(high))
