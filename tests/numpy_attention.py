"""Attention by its definition, in float64 and plain loops: what the fast paths are compared with."""

import numpy as np


def attention(q, k, v, visible, scale):
    """One row: q [T H d], k and v [K S d], visible [K T S] -> [T H d]; a query that sees nothing gets zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, G = np.zeros_like(q), q.shape[1] // k.shape[0]
    for t, h in np.ndindex(q.shape[:2]):
        slots = np.flatnonzero(visible[h // G, t])
        if len(slots):
            logits = k[h // G, slots] @ q[t, h] * scale
            weights = np.exp(logits - logits.max())
            out[t, h] = weights / weights.sum() @ v[h // G, slots]
    return out
