"""What the seams cost: a decode step through policy, parts and taps beside one that is written out by hand.

    python -m experiments.bench.seams [--pairs 25]    # prints a table, writes experiments/results/seams.json
    python -m experiments.bench.seams --smoke         # a tiny model, three pairs, writes nothing

Both sides run 64 greedy steps behind prompts of 64 in one compiled loop, on the same parameters and the same cache
layout; neither asks for taps. The hand-written side knows the model: no policy, no Linen, no step, no site. A ratio
above 1 is what the machinery takes. Tokens of both sides are compared before anything is timed.
"""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

THREADS = 2
RESULTS = Path(__file__).parents[1] / "results" / "seams.json"
PROMPT, NEW = 64, 64


def make_sides(config, params, B: int) -> dict[str, Any]:
    """The two loops, compiled, each a call that returns [B NEW] tokens on the host."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxfw.generate.engine import prefill
    from jaxfw.models import forward
    from jaxfw.models.cache import FullCache

    policy, H, K, d = FullCache(), config.heads, config.kv_heads, config.head_dim
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab, (B, PROMPT), np.int32))
    lengths = jnp.full(B, PROMPT, jnp.int32)
    logits, cache = prefill(config, params, tokens, lengths, policy=policy, room=PROMPT + NEW)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    @jax.jit
    def ours(params, token, cache):
        def advance(i, carry):
            token, cache, drawn = carry
            out = forward(config, params, token[:, None], policy=policy, cache=cache)
            token = jnp.argmax(out.logits[:, 0], axis=-1).astype(jnp.int32)
            return token, out.cache, drawn.at[:, i].set(token)

        return jax.lax.fori_loop(0, NEW, advance, (token, cache, jnp.zeros((B, NEW), jnp.int32)))[2]

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * scale

    angles = config.rope.theta ** (-jnp.arange(d // 2) * 2 / d)

    def turn(x, position):
        cos, sin = jnp.cos(position * angles), jnp.sin(position * angles)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attend(p, x, position, k, v):
        h = norm(x, p["attn_norm"]["scale"])
        q = turn((h @ p["attn"]["q"]["kernel"]).reshape(B, H, d), position).reshape(B, K, H // K, d)
        rows, heads = jnp.arange(B)[:, None], jnp.arange(K)
        k = k.at[rows, heads, position].set(turn((h @ p["attn"]["k"]["kernel"]).reshape(B, K, d), position))
        v = v.at[rows, heads, position].set((h @ p["attn"]["v"]["kernel"]).reshape(B, K, d))
        scores = jnp.einsum("BKGd,BKSd->BKGS", q, k) / math.sqrt(d)
        weights = jax.nn.softmax(jnp.where(jnp.arange(k.shape[2]) <= position, scores, -1e30), axis=-1)
        out = jnp.einsum("BKGS,BKSd->BKGd", weights, v).reshape(B, H * d)
        return x + out @ p["attn"]["o"]["kernel"], k, v

    def feed(p, x):
        h = norm(x, p["mlp_norm"]["scale"])
        gate, up, down = (p["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down

    @jax.jit
    def by_hand(params, token, buffers):
        def advance(i, carry):
            token, buffers, drawn = carry
            x, kept = params["embed"]["embedding"][token], []
            for number, (k, v) in enumerate(buffers):
                p = params[f"layers_{number}"]
                x, k, v = attend(p, x, PROMPT + i, k, v)
                x = feed(p, x)
                kept.append((k, v))
            logits = norm(x, params["head"]["norm"]["scale"]) @ params["head"]["lm_head"].T
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return token, tuple(kept), drawn.at[:, i].set(token)

        return jax.lax.fori_loop(0, NEW, advance, (token, buffers, jnp.zeros((B, NEW), jnp.int32)))[2]

    buffers = tuple((state.k, state.v) for state in cache.layers)
    return {
        "ours": lambda: np.asarray(ours(params, first, cache)),
        "by hand": lambda: np.asarray(by_hand(params, first, buffers)),
    }


def main() -> int:
    """Print the ratios; write the report unless this is a smoke run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["JAX_PLATFORMS"] = "cpu"
    load = os.getloadavg()[0]

    import jax

    from experiments.bench.pairs import take_turns
    from jaxfw.core import runtime
    from jaxfw.models import DecoderConfig, init

    size: dict[str, Any] = {"vocab": 8192, "width": 512, "ffn": 1376, "layers": 8}
    size |= {"heads": 8, "kv_heads": 4, "head_dim": 64}
    if options.smoke:
        size |= {"vocab": 256, "width": 64, "ffn": 96, "layers": 2}
    config = DecoderConfig(**size, positions=PROMPT + NEW, init_std=0.05)
    params, rows = jax.jit(partial(init, config))(jax.random.key(0)), []
    for B in (1, 4):
        sides = make_sides(config, params, B)
        if not (sides["ours"]() == sides["by hand"]()).all():
            raise RuntimeError("the two sides drew different tokens: nothing was timed.")
        rows.append({"batch": B, **take_turns(sides, 3 if options.smoke else options.pairs)})
        low, high = rows[-1]["interval"]
        print(f"B={B}: ratio {rows[-1]['ratio']:.3f} ({low:.3f} to {high:.3f})", flush=True)
    if not options.smoke:
        settings = {"threads": THREADS, "ratio": "seconds through the seams / by hand", "load_before": load, **size}
        report = {"environment": runtime.environment(), "settings": settings, "jobs": rows}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
