"""Decoding with a compressed cache on this CPU: against the full cache, and beside kvpress + transformers.

    .venv-oracle-kv/bin/python -m experiments.bench.kv [--pairs 9]    # prints, writes experiments/results/kv_bench.json
    .venv-oracle-kv/bin/python -m experiments.bench.kv --smoke        # tiny, two pairs, writes nothing

A LLaMA with random weights (4 layers, width 256, 2 key heads of 64, float32), 4 prompts of 4,096 tokens, SnapKV at keep
.25, 64 new tokens each. Both sides have the same weights and prompts, and two threads; what the compressed caches say
is compared before anything is timed. Above 1 we, or the compressed cache, are faster.
"""

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.bench.cpu_lm import RESULTS, THREADS
from experiments.bench.neighbours import Neighbours, wait_until_quiet
from experiments.bench.pairs import take_turns

RESULT = RESULTS.with_name("kv_bench.json")
KEEP, WINDOW, PATIENCE = 0.25, 32, 120.0


def main() -> int:
    """Compare, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    import kvpress  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import DynamicCache, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    from jaxfw import weights
    from jaxfw.core.runtime import environment
    from jaxfw.generate import programs
    from jaxfw.kv import parse
    from jaxfw.models import DecoderConfig, init
    from jaxfw.models.cache import FullCache

    torch.set_num_threads(THREADS)
    layers, B, T, new = (1, 2, 128, 4) if options.smoke else (4, 4, 4096, 64)
    config = DecoderConfig(
        vocab=2048, width=256, ffn=688, layers=layers, heads=4, kv_heads=2, head_dim=64, positions=T + new + 1,
        init_std=1 / 16,
    )  # fmt: skip
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    tokens: Any = np.random.default_rng(0).integers(0, config.vocab, (B, T), np.int32)
    lengths, room = jax.numpy.full(B, T, jax.numpy.int32), T + new
    snapkv = parse(f"snapkv(w={WINDOW})@keep={KEEP}", layers=layers)

    @functools.partial(jax.jit, static_argnums=0)
    def decoded(policy: Any, params: Any, cache: Any, token: Any):
        from jaxfw.models import forward

        def step(carry, _):
            cache, token = carry
            out = forward(config, params, token[:, None], policy=policy, cache=cache)
            token = out.logits[:, 0].argmax(axis=-1).astype(token.dtype)
            return (out.cache, token), token

        return jax.lax.scan(step, (cache, token), None, length=new)[1]

    def read(policy: Any) -> tuple[Any, Any]:
        logits, cache = programs.prefill(config, params, tokens, lengths, policy=policy, room=room)
        return jax.block_until_ready((logits.argmax(axis=-1).astype(np.int32), cache))

    with tempfile.TemporaryDirectory() as folder:
        weights.save(Path(folder) / "model", config, params)
        theirs = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    press = kvpress.SnapKVPress(1 - KEEP, window_size=WINDOW)

    def their_read() -> tuple[Any, Any]:
        cache = DynamicCache()
        with torch.no_grad(), press(theirs):
            out = theirs(torch.from_numpy(tokens).long(), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1), cache

    def their_decode(cache: Any, token: Any) -> Any:
        said = []
        with torch.no_grad():
            for i in range(new):
                at = torch.full((B, 1), T + i)
                out = theirs(token[:, None], past_key_values=cache, use_cache=True, position_ids=at)
                token = out.logits[:, 0].argmax(dim=-1)
                said.append(token)
        return torch.stack(said).numpy()

    token, cache = read(snapkv)
    full_token, full_cache = read(FullCache())
    said = np.asarray(decoded(snapkv, params, cache, token))
    their_token, their_cache = their_read()
    held = [layer.keys.shape[2] for layer in their_cache.layers]
    same = float((their_decode(their_cache, their_token) == said).mean())
    print(
        f"kvpress keeps {held} tokens a layer, we {int(cache.layers[0].held[0])}; {same:.0%} of what is said is equal"
    )

    def their_turn() -> None:
        # Its cache grows as it decodes: cut back to the prompt's part, which costs next to nothing.
        for layer, n in zip(their_cache.layers, held, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :n], layer.values[:, :, :n]
        their_decode(their_cache, their_token)

    jobs = {
        "decode: full cache / keep .25": {
            "full": lambda: jax.block_until_ready(decoded(FullCache(), params, full_cache, full_token)),
            "ours": lambda: jax.block_until_ready(decoded(snapkv, params, cache, token)),
        },
        "decode: kvpress / ours": {"kvpress": their_turn, "ours": lambda: jax.block_until_ready(
            decoded(snapkv, params, cache, token))},
        "read and compress: kvpress / ours": {"kvpress": their_read, "ours": lambda: read(snapkv)},
    }  # fmt: skip
    found = []
    for name, sides in jobs.items():
        if not options.smoke:
            wait_until_quiet(PATIENCE)
        watch = Neighbours()
        timed = take_turns(sides, 2 if options.smoke else options.pairs)
        count = B * (T if name.startswith("read") else new)
        rates = {side: count / seconds for side, seconds in timed["median_seconds"].items()}
        found.append({"job": name, **timed, "tokens_per_second": rates, "others": watch.share()})
        low, high = timed["interval"]
        spoken = ", ".join(f"{side} {rate:,.0f}" for side, rate in rates.items())
        print(f"{name:34} ratio {timed['ratio']:.2f} [{low:.2f}, {high:.2f}]   tokens/s: {spoken}", flush=True)
    if not options.smoke:
        shape = {"layers": layers, "batch": B, "prompt": T, "new": new, "keep": KEEP, "same_tokens": same}
        report = {"jobs": found, "shape": shape, "environment": environment()}
        RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
