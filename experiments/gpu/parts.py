"""What `experiments.gpu` runs: checks that the accelerator computes the same, and benchmarks of it.

Checks compare float32 there with float32 on the host's CPU. Speeds are of a LLaMA of 1.1 B parameters in bfloat16 (a
training step with AdamW and float32 state), of one with Llama-3.1-8B's shapes (prefill, decoding), of kernels at the
shapes of real models; and what the replay predicts stands beside what was measured.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.audit import programs
from jaxfw.core import aot
from jaxfw.core.hardware import mfu
from jaxfw.core.mesh import make_mesh
from jaxfw.core.replay import PROFILES, replay
from jaxfw.generate import generate
from jaxfw.generate.timing import measure_speed
from jaxfw.models import DecoderConfig, Rope, forward, init
from jaxfw.models.accounting import parameter_bytes, parameter_count, train_flops
from jaxfw.models.presets import preset
from jaxfw.train import NextTokenLoss, OptimizerConfig, init_state, make_optimizer, make_step
from pallas_kernels import decode_attention
from pallas_kernels._shapes import DECODE_SHAPES, DecodeShape
from pallas_kernels.decode_attention import reference

SMALL = DecoderConfig(
    vocab=512, width=128, ffn=352, layers=2, heads=8, kv_heads=2, head_dim=16, positions=1024,
    rope=Rope(theta=5e5, kind="llama3", factor=8.0, original_positions=256),
)  # fmt: skip
LARGE = DecoderConfig(
    vocab=32768, width=2048, ffn=5632, layers=22, heads=32, kv_heads=4, head_dim=64, positions=4096, dtype="bfloat16"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of the benchmarks: `trained` learns rows of `length` tokens, `served` reads `prompt` and writes `new`."""

    trained: DecoderConfig
    batch: int
    length: int
    served: DecoderConfig
    prompt: int
    new: int
    repeats: int
    kernels: tuple[str, ...] = ("llama-3.1-8b/8x32768", "qwen2.5-7b/32x32768", "llama-3.1-8b/1x131072")


FULL = Sizes(LARGE, batch=4, length=2048, served=preset("llama-3.1-8b"), prompt=2048, new=128, repeats=10)
SMOKE = Sizes(SMALL, batch=2, length=64, served=SMALL, prompt=32, new=8, repeats=2)


def check_forward() -> dict[str, Any]:
    """Logits of a batch with padding, here and on the CPU: the largest difference in units of their deviation."""
    params = init(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 700), 0, SMALL.vocab)
    lengths = jnp.array([700, 512, 9])

    def run() -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(lambda p, t, n: forward(SMALL, p, t, lengths=n).logits)(params, tokens, lengths))

    here = run()
    with jax.default_device(jax.devices("cpu")[0]):
        params, tokens, lengths = jax.device_put((params, tokens, lengths), jax.devices("cpu")[0])
        there = run()
    valid = np.arange(700) < np.asarray(lengths)[:, None]
    error = float(np.abs(here - there)[valid].max() / there[valid].std())
    return {"error": error, "bound": 1e-4, "ok": error <= 1e-4}


def check_decode() -> dict[str, Any]:
    """Greedy tokens through the cache equal those of whole forwards, up to the first near-tie."""
    params, prompts = init(SMALL, jax.random.key(0)), [[5, 9, 200], list(range(3, 60)), [7]]
    with jax.default_matmul_precision("highest"):
        rows = generate(SMALL, params, prompts, max_new_tokens=48).tokens
        logits = jax.jit(lambda t: forward(SMALL, params, t).logits)
        wrong = 0
        for prompt, new in zip(prompts, rows):
            out = np.asarray(logits(jnp.array([[*prompt, *new]])))[0, len(prompt) - 1 : -1]
            top = np.sort(out, axis=-1)
            is_tie = top[:, -1] - top[:, -2] < 1e-4 * out.std()
            differs = (out.argmax(axis=-1) != np.array(new)) & ~is_tie
            wrong += int(differs.any())
    return {"rows that differ": wrong, "bound": 0, "ok": wrong == 0}


def _decode_inputs(B: int, H: int, K: int, S: int, d: int, dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v and lengths: full rows, and from the second on some that are shorter."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, H, d), (B, K, S, d), (B, K, S, d))
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return q, k, v, S - jnp.arange(B, dtype=jnp.int32) * (S // (2 * B))


def check_kernel() -> dict[str, Any]:
    """`decode_attention` as this platform runs it beside its reference: difference, in float32 and bfloat16."""
    bounds, errors = {"float32": 1e-5, "bfloat16": 1e-2}, {}
    for dtype in bounds:
        q, k, v, lengths = _decode_inputs(3, 28, 4, 1000, 80, dtype)
        run = jax.jit(lambda q, k, v, n: decode_attention(q, k, v, lengths=n, scale=0.1, return_mass=True))
        with jax.default_matmul_precision("highest"):
            pairs = zip(*map(jax.tree.leaves, (run(q, k, v, lengths), reference(q, k, v, lengths=lengths, scale=0.1))))
            errors[dtype] = max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))) for a, b in pairs)
    return {"errors": errors, "bounds": bounds, "ok": all(errors[dtype] <= bounds[dtype] for dtype in bounds)}


def time_kernel(sizes: Sizes) -> dict[str, Any]:
    """`decode_attention` against XLA's form of it on the same cache: seconds, bytes of cache read per second, ratio."""
    rows = {}
    for name in sizes.kernels:
        shape = DECODE_SHAPES[name] if sizes.trained is LARGE else DecodeShape(2, 8, 2, 256, 64)
        q, k, v, lengths = _decode_inputs(shape.B, shape.H, shape.K, shape.S, shape.d, "bfloat16")
        seconds = {}
        for impl in (None, "xla"):
            run = jax.jit(lambda q, k, v, n, impl=impl: decode_attention(q, k, v, lengths=n, scale=0.1, impl=impl).out)
            seconds[impl or "chosen"] = median_seconds(run, (q, k, v, lengths), sizes.repeats)
        if jax.default_backend() == "gpu":
            theirs = (q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), lengths)  # laid out as cuDNN takes them
            seconds["cudnn"] = median_seconds(jax.jit(_cudnn), theirs, sizes.repeats)
        read = 4 * shape.K * shape.d * int(lengths.sum())
        ratio = seconds["xla"] / seconds["chosen"]
        rows[name] = {"seconds": seconds, "bytes_per_second": read / seconds["chosen"], "faster_than_xla": ratio}
    return rows


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Attention of one query by cuDNN, with keys and values [B S K d]."""
    return jax.nn.dot_product_attention(
        q[:, None], k, v, scale=0.1, key_value_seq_lengths=lengths, implementation="cudnn"
    )  # fmt: skip


def median_seconds(run: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """Of a call that donates nothing, after two that warm it up."""
    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - begun)
    return float(np.median(times[2:]))


def time_training(sizes: Sizes) -> dict[str, Any]:
    """Seconds of a training step, tokens per second, and the share of the peak that model FLOPs make up."""
    config = sizes.trained
    optimizer = make_optimizer(OptimizerConfig(warmup=1), steps=1000)
    step, state = make_step(NextTokenLoss(config), optimizer), init_state(init(config, jax.random.key(0)), optimizer)
    shape = (sizes.batch, sizes.length + 1)
    batch = {"tokens": jax.random.randint(jax.random.key(1), shape, 0, config.vocab)}
    times = []
    for _ in range(sizes.repeats + 2):
        begun = time.perf_counter()
        state, metrics = step(state, batch, jax.random.key(2))
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begun)
    seconds = float(np.median(times[2:]))
    flops = train_flops(config, batch=sizes.batch, length=sizes.length)
    return {
        "parameters": parameter_count(config), "batch": sizes.batch, "length": sizes.length, "seconds": seconds,
        "tokens_per_second": sizes.batch * sizes.length / seconds, "flops_per_step": flops,
        "flops_per_second": flops / seconds, "mfu": mfu(flops / seconds, jax.devices()[:1], config.dtype),
        "compile_seconds": times[0] - seconds,
        "predicted_seconds": predicted(programs.train_step(config, _mesh(), batch=sizes.batch, length=sizes.length,
                                                           optimizer=OptimizerConfig(warmup=1))),
    }  # fmt: skip


def time_generation(sizes: Sizes, batch: int) -> dict[str, Any]:
    """Tokens per second of prefill and decoding, parameters in bfloat16; bytes of weights read per second."""
    config = dataclasses.replace(sizes.served, param_dtype="bfloat16", dtype="bfloat16")
    params = jax.jit(lambda: init(config, jax.random.key(0)))()
    speed = measure_speed(config, params, batch=batch, prompt=sizes.prompt, new=sizes.new, repeats=sizes.repeats)
    read = (parameter_bytes(config) - 2 * config.vocab * config.width) * speed.decode / batch
    step = programs.decode_step(config, _mesh(), batch=batch, length=sizes.prompt + sizes.new)
    return {
        "parameters": parameter_count(config), "batch": batch, "prompt": sizes.prompt, "new": sizes.new,
        "prefill_tokens_per_second": speed.prefill, "decode_tokens_per_second": speed.decode,
        "weight_bytes_per_second": read, "decode_step_seconds": batch / speed.decode,
        "predicted_seconds": predicted(step),
    }  # fmt: skip


def _mesh() -> jax.sharding.Mesh:
    """One device: the accelerator or, without one, a described one to compile for."""
    if jax.default_backend() == "gpu":
        return make_mesh(devices=jax.devices()[:1])
    return aot.cluster("h200:1x1")


def predicted(program: programs.Program) -> float | None:
    """Seconds that the replay gives a program; None for a card whose rates are not known."""
    kind = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else "NVIDIA H200"
    chip = next((name for name in PROFILES if name.upper() in kind.upper()), None)
    if chip is None:
        return None
    compiled = program.compile()
    return replay(compiled.text, PROFILES[chip], gpus_per_host=1, streams=compiled.streams).seconds


Part = Callable[[Sizes], dict[str, Any]]
# By name: what is run, and the seconds after which it is stopped, of all 520.
PARTS: dict[str, tuple[Part, int]] = {
    "forward": (lambda sizes: check_forward(), 40),
    "decoding": (lambda sizes: check_decode(), 50),
    "decode_attention": (lambda sizes: check_kernel(), 40),
    "decode_attention_speed": (time_kernel, 80),
    "training": (time_training, 110),
    "generation_1": (lambda sizes: time_generation(sizes, 1), 100),
    "generation_32": (lambda sizes: time_generation(sizes, 32), 100),
}
