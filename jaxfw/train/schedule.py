"""The learning rate by update: warm-up, then one of four ways on.

| schedule | behind the warm-up |
|---|---|
| cosine | half a cosine down to `final` times the peak |
| linear | a line down to `final` times the peak |
| constant | the peak |
| wsd | the peak, and over the last `decay` of all updates a line down to `final` times the peak |

"wsd" is warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395); a run may go on from where it begins to fall.
"""

import optax

from jaxfw.core.errors import InputError, unknown

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def make_schedule(
    kind: str, *, peak: float, warmup: int, updates: int, final: float = 0.1, decay: float = 0.2
) -> optax.Schedule:
    """Update number, from 0, to learning rate, for a run of `updates`; at `updates` the end is reached.

    >>> rate = make_schedule("wsd", peak=1.0, warmup=2, updates=10, final=0.0, decay=0.2)
    >>> [round(float(rate(n)), 2) for n in (0, 1, 2, 7, 8, 9, 10)]
    [0.5, 0.75, 1.0, 1.0, 1.0, 0.5, 0.0]

    Raises:
        InputError: an unknown kind, or a warm-up (and decay) that does not fit into the run.
    """
    if kind not in SCHEDULES:
        raise unknown("optimizer.schedule", kind, SCHEDULES)
    if warmup >= updates:
        raise InputError(f"optimizer.warmup={warmup} must be below the run's {updates} steps.")
    left = updates - warmup
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, warmup)
    if kind == "wsd":
        falling = max(round(decay * updates), 1)
        if falling > left:
            raise InputError(
                f"optimizer.decay={decay} falls over {falling} of the run's {updates} updates, and optimizer.warmup="
                f"{warmup} leaves {left}: lower one of them."
            )
        fall = optax.linear_schedule(peak, peak * final, falling)
        return optax.join_schedules([rise, optax.constant_schedule(peak), fall], boundaries=[warmup, updates - falling])
    behind = {
        "cosine": optax.cosine_decay_schedule(peak, left, alpha=final),
        "linear": optax.linear_schedule(peak, peak * final, left),
        "constant": optax.constant_schedule(peak),
    }
    return optax.join_schedules([rise, behind[kind]], boundaries=[warmup])
