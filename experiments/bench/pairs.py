"""Two sides that do the same work take turns; what counts is the ratio of each pair, and its median over the pairs."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

CONFIDENCE = 0.95


def take_turns(sides: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """Seconds of both sides in each pair; the ratio is the first side's seconds over the second's.

    Each call must end when its result is there. A first pair warms up and does not count. `interval` holds the median
    ratio with 95 % confidence (order statistics).
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if pair:
                seconds[name].append(time.perf_counter() - started)
    first, second = seconds.values()
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    k = interval_rank(pairs)
    return {
        "ratio": statistics.median(ratios),
        "interval": [ratios[k], ratios[-1 - k]],
        "range": [ratios[0], ratios[-1]],
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
    }


def interval_rank(n: int, confidence: float = CONFIDENCE) -> int:
    """The largest k for which the sorted values k and n-1-k enclose the median with `confidence`; 0 if none does.

    >>> [interval_rank(n) for n in (3, 9, 25)]
    [0, 1, 7]
    """
    outside, k = 0.0, -1
    while k + 1 < n / 2:
        outside += 2 * math.comb(n, k + 1) / 2**n
        if outside > 1 - confidence:
            break
        k += 1
    return max(k, 0)
