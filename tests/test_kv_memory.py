"""How much memory compression leaves: at the peak of reading a prompt part by part, and in every decode step.

Sizes are those of compiled programs and abstract values, of shapes that nothing here would want to run. One small
prompt is run, to see that what is alive between the parts is what was counted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.generate import engine, programs
from jaxfw.kv import METHODS, parse
from jaxfw.kv.heads import Even
from jaxfw.models import DecoderConfig, attention_spec, init
from jaxfw.models.cache import Cache, FullCache
from jaxfw.ops.sampling import Sampling
from pallas_kernels.ragged_decode import BLOCK
from tests.cache_contract import FAST_TO_COMPILE, fast_to_compile

# As many key heads as query heads, and little else: keys and values are most of what could stay alive.
CONFIG = DecoderConfig(vocab=256, width=128, ffn=256, layers=8, heads=4, kv_heads=4, head_dim=64, positions=16384)
SPEC = attention_spec(CONFIG)
T, KEEP, LONG, KEEPS = 2048, 0.1, 8192, (0.1, 0.25, 0.5)
# What whole units take beyond the budget is a fixed number of slots, which short prompts would show.
FIELDS = {"pyramidkv": "(w=8,beta=4)", "chunkkv": "(reuse=2)"} | dict.fromkeys(
    ("shotkv", "randomshot", "oracleshot"), "(extra=0)"
)
GLOBAL = f"shotkv(scope=global,extra=0)@keep={KEEP}"
OF_BYTES = ("snapkv", "pyramidkv", "chunkkv", "streaming(reassign=false)", "shotkv", "adakv")


def nbytes(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


@functools.cache
def params(layers=1):
    return jax.eval_shape(functools.partial(init, dataclasses.replace(CONFIG, layers=layers)), jax.random.key(0))


def compiled(program, *arguments, **options):
    return program.lower(*arguments, **options).compile(compiler_options=FAST_TO_COMPILE).memory_analysis()


# --- while a prompt is read


@functools.cache
def step():
    ids, key = jnp.zeros((1, T), jnp.int32), jax.random.split(jax.random.key(0), 1)
    made = programs._step(jnp.full(1, T, jnp.int32), None, T=T)
    return jax.eval_shape(lambda: dataclasses.replace(made, tokens=ids, unit_id=ids, key=key))


X = jax.ShapeDtypeStruct((1, T, CONFIG.width), jnp.float32)
READ = nbytes((X, step()))  # what all calls are given


def beside(memory):
    """Bytes that a call takes beside its arguments."""
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


@functools.cache
def call(policy, below=None):
    """The state that a layer leaves, and the bytes that its call takes beside that and its arguments."""
    options = {
        "policy": policy, "room": T + 1, "previous": None if below is None else call(below)[0], "state": None,
        "shared": None, "write": True, "router": None, "experts": None, "router_state": None, "taps": (),
        "collected": (),
    }  # fmt: skip
    arguments = (CONFIG.at(0), params()["layers_0"], X, step())
    state = jax.eval_shape(functools.partial(programs._layer, CONFIG.at(0), **options), *arguments[1:]).state
    return state, beside(compiled(programs._layer, *arguments, **options)) - nbytes(state)


def peak(policy, layers):
    """Most bytes alive beside the parameters, at the last layer's call or that of `finish`."""
    kinds = {policy.at(0): call(policy.at(0))}
    second = call(policy.at(1), policy.at(0) if policy.reads_previous else None)
    kinds.setdefault(policy.at(1), second)
    states = tuple(
        kinds[policy.at(i)][0] if policy.at(i) in kinds else empty(policy.at(i), T, 1) for i in range(layers)
    )
    finish = beside(compiled(programs._finish, policy, states, step()))
    return READ + nbytes(states) + max(finish, *(working for _, working in kinds.values()))


def empty(policy, prompt, new, dtype=jnp.float32):
    """One layer's state, abstractly; the contract has it that a prompt leaves the same."""
    return jax.eval_shape(lambda: policy.empty(1, spec=SPEC, prompt=prompt, new=new, dtype=dtype))


FULL_LAYER = 2 * T * CONFIG.kv_heads * CONFIG.head_dim * 4


def bound(layers, whole=0.0):
    """Of a share `KEEP` of all layers, and a share `whole` of them besides."""
    working = call(FullCache())[1] + READ
    return 1.2 * (working + FULL_LAYER + (KEEP + whole) * layers * FULL_LAYER)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_of_read_layers_only_what_is_kept_is_alive(method):
    found = {}
    for layers in (16, 32):
        # Only a pyramid asks how many there are; all others share what was compiled.
        of = layers if METHODS[method].layers.by_layer else 1
        found[layers] = peak(parse(f"{method}{FIELDS.get(method, '')}@keep={KEEP}", layers=of), layers)
        assert found[layers] <= bound(layers)
    added = (found[32] - found[16]) / (16 * FULL_LAYER)
    blocks = 0 if METHODS[method].heads == Even() else (BLOCK - 1) / T  # each head begins with a new one
    assert abs(added - KEEP - blocks) <= 0.02 * KEEP, "more layers add what they keep, and nothing else"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_one_choice_for_all_layers_holds_all_of_them_until_it_is_made():
    """Its own bound: every layer's whole prompt, and beside it what stays."""
    found = {layers: peak(parse(GLOBAL), layers) for layers in (16, 32)}
    for layers, bytes_ in found.items():
        assert bound(layers) < bytes_ <= bound(layers, whole=1)
    added = (found[32] - found[16]) / (16 * FULL_LAYER)
    assert 1 <= added <= (1 + KEEP) * 1.02


@pytest.mark.slow
def test_a_full_cache_is_beyond_the_bound():
    found = {layers: peak(FullCache(), layers) for layers in (16, 32)}
    assert all(bytes_ > bound(layers) for layers, bytes_ in found.items())
    assert found[32] - found[16] == pytest.approx(16 * FULL_LAYER, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["snapkv(w=4)", "pyramidkv(w=2,beta=4)", "chunkkv(w=4,reuse=2)"])
def test_what_is_alive_between_the_parts_is_what_was_counted(method, monkeypatch):
    config = dataclasses.replace(CONFIG, layers=4, width=16, ffn=16, heads=2, kv_heads=2, head_dim=8)
    policy, spec, B, width = parse(f"{method}@keep={KEEP}", layers=config.layers), attention_spec(config), 2, 256
    weights = jax.jit(init, static_argnums=0)(config, jax.random.key(0))
    prompt, lengths = jnp.zeros((B, width), jnp.int32), jnp.asarray([256, 200], jnp.int32)
    seen, run = [], programs._layer

    def watched(*arguments, **options):
        seen.append(nbytes(jax.live_arrays()))
        return run(*arguments, **options)

    monkeypatch.setattr(programs, "_layer", watched)
    before = nbytes(jax.live_arrays())
    with fast_to_compile():
        logits, cache = engine.prefill(config, weights, prompt, lengths, policy=policy, room=width + 1)
    assert len(seen) == config.layers
    options = {"spec": spec, "prompt": width, "new": 1, "dtype": jnp.float32}
    left = [nbytes(jax.eval_shape(lambda i=i: policy.at(i).empty(B, **options))) for i in range(config.layers)]
    residual = 4 * B * width * config.width
    for alive, kept in zip(seen, np.cumsum([0, *left])):
        assert residual + kept <= alive - before <= residual + kept + 4096, "and the positions and lengths"
    assert nbytes(cache) == sum(left)


# --- while text is generated


def cache_of(policy, new, dtype="float32"):
    """Of all layers, behind a long prompt."""
    return Cache(tuple(empty(policy.at(i), LONG, new, jnp.dtype(dtype)) for i in range(CONFIG.layers)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", OF_BYTES)
def test_bytes_of_a_state_are_the_share_that_is_kept(method, dtype):
    """All of them: positions, lengths and scores too. Slots for what is generated come on top."""
    full = cache_of(FullCache(), 0, dtype).nbytes
    for keep in KEEPS:
        policy = parse(f"{method}@keep={keep}", layers=CONFIG.layers)
        assert keep * full <= cache_of(policy, 0, dtype).nbytes <= (keep + 0.02) * full
        segment = cache_of(policy, 1, dtype).nbytes - cache_of(policy, 0, dtype).nbytes
        assert segment <= full / LONG * 1.02, "a slot a layer"


@functools.cache
def decoded(policy):
    """The memory analysis of the decode loop, and the bytes that it is given beside the parameters."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    logits, stop = jax.ShapeDtypeStruct((1, CONFIG.vocab), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    sampling, weights = Sampling().typed(), params(CONFIG.layers)
    state = jax.eval_shape(programs.start, cache_of(policy, 1), logits, keys, keys, sampling, stop)
    arguments = (CONFIG, policy, weights, state, sampling, stop, jax.ShapeDtypeStruct((), jnp.int32))
    memory = compiled(programs.decode, *arguments, chunk=1)
    return memory, memory.argument_size_in_bytes - nbytes(weights)


@pytest.mark.slow
@pytest.mark.parametrize("method, keep", [*((method, 0.1) for method in OF_BYTES), ("snapkv", 0.5)])
def test_a_decode_step_is_given_the_share_that_is_kept_and_copies_none_of_it(method, keep):
    policy = parse(f"{method}@keep={keep}", layers=CONFIG.layers)
    memory, given = decoded(policy)
    cache, full = cache_of(policy, 1).nbytes, decoded(FullCache())[1]
    segment = cache - cache_of(policy, 0).nbytes
    assert given - segment <= (keep + 0.02) * full
    assert cache <= given <= cache + 4096, "nothing but the cache, and a few numbers a row"
    assert memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes <= 0.01 * cache
