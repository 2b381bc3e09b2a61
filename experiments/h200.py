"""Programs of published models as XLA compiles them for H200s, from a machine without one. Needs `aot`.

    python -m experiments.h200        # prints a table, writes experiments/results/h200.json

Compiled, never timed: one decode step of Llama-3.1-8B on eight GPUs (tensor=8) and on one, there also with weights in 4
and 8 bits, and the prefill of one of its layers, which a host loop runs for all. A row says what a device holds, which
kernels the program calls, and which collectives it waits for.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxfw.core import aot, hlo, runtime
from jaxfw.core.mesh import BATCH_AXES, fit
from jaxfw.core.sharding import shardings
from jaxfw.models import DecoderConfig, attention_spec, first_step, forward, layer
from jaxfw.models.cache import Cache, FullCache
from jaxfw.models.presets import preset
from jaxfw.models.sharding import batch_shardings, cache_shardings, decoder_rules
from jaxfw.weights import abstract_params

RESULTS = Path(__file__).parent / "results" / "h200.json"
MODEL = "llama-3.1-8b"
KERNELS = {"__gpu$xla.gpu.triton": "decode_attention", "__cudnn$fmhaSoftmax": "cuDNN attention"}


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def placed_params(config: DecoderConfig, mesh: jax.sharding.Mesh, quantise: str | None = None) -> Any:
    """Parameters as shapes, laid out by the rules."""
    shapes = abstract_params(config, quantise=quantise)
    return _placed(shapes, shardings(decoder_rules(config), mesh, shapes))


def compile_decode(
    config: DecoderConfig, mesh: jax.sharding.Mesh, *, batch: int, length: int, quantise: str | None = None
) -> aot.Compiled:
    """One decode step of the whole model on a full cache of `length` slots, which is donated."""
    policy, params = FullCache(), placed_params(config, mesh, quantise)
    empty = functools.partial(policy.empty, spec=attention_spec(config), prompt=length - 1, new=1, dtype=config.dtype)
    cache = jax.eval_shape(lambda: Cache(tuple(empty(batch) for _ in range(config.layers))))
    cache = _placed(cache, cache_shardings(mesh, cache))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)

    def step(params, tokens, cache):
        out = forward(config, params, tokens, policy=policy, cache=cache)
        return jnp.argmax(out.logits[:, 0], axis=-1), out.cache

    tokens = _placed(tokens, batch_shardings(mesh, tokens))
    return aot.compile(jax.jit(step, donate_argnums=2), params, tokens, cache, mesh=mesh)


def compile_prefill_layer(config: DecoderConfig, mesh: jax.sharding.Mesh, *, batch: int, length: int) -> aot.Compiled:
    """One layer over prompts of `length` tokens, into a cache with room for 128 more; the residual is donated."""
    x = jax.ShapeDtypeStruct((batch, length, config.width), config.dtype)
    x = _placed(x, jax.sharding.NamedSharding(mesh, fit(mesh.shape, x.shape, (BATCH_AXES, None, None))))
    step = jax.eval_shape(lambda: first_step(jnp.full(batch, length, jnp.int32), length))

    def run(params, x, step):
        out = layer(config, params, x, step, policy=FullCache(), room=length + 128)
        return out.x, out.state

    return aot.compile(jax.jit(run, donate_argnums=1), placed_params(config, mesh)["layers_0"], x, step, mesh=mesh)


def describe(compiled: aot.Compiled) -> dict[str, Any]:
    """Bytes of a device, calls of kernels, and collectives by kind: how often, and the bytes of the largest."""
    kinds: dict[str, dict[str, int]] = {}
    for found in hlo.collectives(compiled.text):
        entry = kinds.setdefault(found.kind, {"times": 0, "largest_bytes": 0})
        entry["times"] += found.times
        entry["largest_bytes"] = max(entry["largest_bytes"], found.bytes)
    calls = hlo.custom_calls(compiled.text)
    return {
        "bytes_per_device": dataclasses.asdict(compiled.bytes) | {"total": compiled.bytes.total},
        "kernels": {KERNELS[target]: count for target, count in calls.items() if target in KERNELS},
        "collectives": kinds,
    }


def main() -> int:
    """Compile everything, print and write the table."""
    config = preset(MODEL)
    eight, one = aot.cluster("h200:1x1x8", tensor=8), aot.cluster("h200:1x1x1")
    programs = {
        "decode step, tensor=8, batch 8, cache 32768": compile_decode(config, eight, batch=8, length=32768),
        "decode step, one GPU, batch 8, cache 32768": compile_decode(config, one, batch=8, length=32768),
        **{
            f"decode step, one GPU, batch 1, cache 8192, {name}": compile_decode(
                config, one, batch=1, length=8192, quantise=name
            )
            for name in ("int4", "int8")
        },
        "prefill of a layer, tensor=8, batch 8 x 4096": compile_prefill_layer(config, eight, batch=8, length=4096),
        "prefill of a layer, one GPU, batch 1 x 32768": compile_prefill_layer(config, one, batch=1, length=32768),
    }
    rows = {name: describe(program) for name, program in programs.items()}
    for name, row in rows.items():
        held = ", ".join(f"{part} {count / 2**30:.2f}" for part, count in row["bytes_per_device"].items())
        print(f"{name}\n    GiB a device: {held}\n    kernels: {row['kernels']}\n    collectives: {row['collectives']}")
    report = {"environment": runtime.environment(), "target": "compiled for H200", "model": MODEL, "programs": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
