"""A chunked expert layer compiled for 2 hosts of 8 H200s, and how much of its communication XLA hides. Needs `aot`.

    python -m experiments.overlap        # prints a table, writes experiments/results/overlap.json

The layer of tests/fixtures/audit: of an MoE block the dispatched buffer [E=8, 16 C, 4096] with C = 2 * 2048 / 8 slots
for each device and expert, cut into 4 chunks of slots; a chunk goes by all-to-all between the hosts and all-gather
inside of one through SwiGLU experts (hidden 14,336, cut over the 8 GPUs), then reduce-scatter and all-to-all back. As
it is, and with XLA's options for overlap; predicted by the replay, beside the figures of an independent one.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxfw.audit.options import parse_options
from jaxfw.core import aot, hlo, runtime
from jaxfw.core.replay import PROFILES, Streams, replay

RESULT = Path(__file__).parent / "results" / "overlap.json"
FIGURES = Path(__file__).parents[1] / "tests" / "fixtures" / "audit" / "figures.json"
EXPERTS, WIDTH, HIDDEN, TOKENS, CHOSEN, CHUNKS = 8, 4096, 14336, 2048, 2, 4
SLOTS = CHOSEN * TOKENS // EXPERTS  # of each device, for each expert
DEVICES, HOSTS, GPUS = 16, 2, 8


def experts(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """SwiGLU of each expert over its slots: [e s D] -> [e s D], the hidden width cut over `tensor`."""
    hidden = jax.nn.silu(jnp.einsum("esd,edf->esf", x, gate)) * jnp.einsum("esd,edf->esf", x, up)
    return jnp.einsum("esf,efd->esd", hidden, down)


def layer(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """One device's part: [E C D] -> [E C D], chunk by chunk."""
    outs = []
    for chunk in jnp.split(x, CHUNKS, axis=1):
        here = jax.lax.all_to_all(chunk, "expert", 0, 1, tiled=True)
        here = jax.lax.all_gather(here, "tensor", axis=1, tiled=True)
        out = experts(here, gate, up, down)
        out = jax.lax.psum_scatter(out, "tensor", scatter_dimension=1, tiled=True)
        outs.append(jax.lax.all_to_all(out, "expert", 1, 0, tiled=True))
    return jnp.concatenate(outs, axis=1)


def compile_layer(options: str) -> aot.Compiled:
    """For 2 hosts of 8, with a set of options."""
    mesh = aot.cluster(f"h200:{HOSTS}x{GPUS}", expert=HOSTS, tensor=GPUS)
    slots, weights = PartitionSpec(None, ("expert", "tensor")), PartitionSpec("expert", None, "tensor")
    back = PartitionSpec("expert", "tensor")
    run = jax.jit(
        partial(jax.shard_map, mesh=mesh, in_specs=(slots, weights, weights, back), out_specs=slots, check_vma=False)(
            layer
        )
    )

    def array(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    return aot.compile(
        run, array((EXPERTS, DEVICES * SLOTS, WIDTH), slots), array((EXPERTS, WIDTH, HIDDEN), weights),
        array((EXPERTS, WIDTH, HIDDEN), weights), array((EXPERTS, HIDDEN, WIDTH), back), mesh=mesh,
        compiler_options=parse_options(options),
    )  # fmt: skip


def measure(options: str) -> dict[str, Any]:
    """Predicted milliseconds and hidden shares, with a stream for each link and with one for all."""
    text = compile_layer(options).text
    found: dict[str, Any] = {"collectives": {}}
    for one in hlo.collectives(text):
        found["collectives"][one.kind] = found["collectives"].get(one.kind, 0) + one.times
    cases: tuple[tuple[Streams, str], ...] = (("link", "one_stream_per_link"), ("one", "one_stream"))
    for streams, name in cases:
        timeline = replay(text, PROFILES["h200"], gpus_per_host=GPUS, streams=streams)
        shares = {"hidden": timeline.hidden(), "inter": timeline.hidden("inter"), "intra": timeline.hidden("intra")}
        found[name] = {"ms": 1e3 * timeline.seconds, **shares}
    return found


def main() -> int:
    """Compile, replay, print, write."""
    theirs = json.loads(FIGURES.read_text(encoding="utf-8"))["variants"]
    rows = {name: {"ours": measure(options), "theirs": theirs[name]["one_stream_per_link"]}
            for name, options in (("default", "none"), ("options", "overlap"))}  # fmt: skip
    for name, row in rows.items():
        ours, other = row["ours"]["one_stream_per_link"], row["theirs"]
        print(f"{name:8} ours {ours['ms']:.3f} ms, {ours['hidden']:.0%} hidden (between hosts {ours['inter']:.0%}); "
              f"theirs {other['ms']:.3f} ms, {other['hidden']:.0%} ({other['inter']:.0%})")  # fmt: skip
    report = {"predicted": True, "variants": rows, "environment": runtime.environment()}
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
