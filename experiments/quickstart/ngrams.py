"""What single tokens and pairs of them predict: the losses that a model must beat."""

import numpy as np


def ngram_nll(tokens: np.ndarray, windows: list[np.ndarray], vocab: int, *, order: int) -> np.ndarray:
    """Nats a token in each window, from smoothed counts of the training tokens.

    Pairs are interpolated with single tokens by Witten and Bell's rule: a context is trusted the more often it was seen
    and the fewer different tokens followed it.
    """
    single = np.bincount(tokens, minlength=vocab) + 1.0
    single /= single.sum()
    held_out = np.concatenate(windows)
    before, after = held_out[:, :-1], held_out[:, 1:]
    if order == 1:
        return -np.log(single[after]).mean(axis=1)
    pairs, counts = np.unique(tokens[:-1].astype(np.int64) * vocab + tokens[1:], return_counts=True)
    seen = np.bincount(tokens[:-1], minlength=vocab)
    kinds = np.bincount(pairs // vocab, minlength=vocab)
    wanted = before.astype(np.int64) * vocab + after
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    likelihood = np.where(pairs[place] == wanted, counts[place], 0) / np.maximum(seen, 1)[before]
    back_off = np.where(seen > 0, kinds / np.maximum(seen + kinds, 1), 1.0)[before]
    return -np.log((1 - back_off) * likelihood + back_off * single[after]).mean(axis=1)
