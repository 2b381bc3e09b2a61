"""NextTokenLoss on packed rows, in chunks of the vocabulary and with layers computed again: one loss, less memory."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxfw.core import aot
from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, MoEConfig, init, stack_layers
from jaxfw.train import NextTokenLoss

CONFIG = DecoderConfig(
    vocab=96, width=16, ffn=32, layers=2, heads=4, kv_heads=2, head_dim=4, positions=64, init_std=0.3,
)  # fmt: skip
MIXTURE = dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, per_token=2, ffn=16), tie_embeddings=True)
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": RNG.integers(0, 96, (2, 25), np.int32),
    "segment_ids": np.array([[1] * 9 + [2] * 12 + [0] * 4, [1] * 25], np.int32),
    "weights": RNG.integers(0, 2, (2, 25)).astype(np.float32),
}


def graded(loss, params, batch=BATCH):
    return jax.jit(jax.value_and_grad(lambda p: loss(p, batch, jax.random.key(0), state={})[0]))(params)


@pytest.fixture(scope="module", params=[CONFIG, MIXTURE], ids=["dense", "mixture"])
def plain(request):
    config = request.param
    params = init(config, jax.random.key(1))
    loss = NextTokenLoss(config, router_losses=(("balance", 0.1),) if config.moe else ())
    return loss, params, graded(loss, params)


@pytest.mark.parametrize("options", [{"chunk": 7}, {"remat": "layer"}, {"remat": "products", "chunk": 24}], ids=str)
def test_one_loss_however_it_is_computed(plain, options):
    loss, params, (value, grads) = plain
    found, found_grads = graded(dataclasses.replace(loss, **options), params)
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    for (path, expected), got in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(found_grads)):
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max(), jax.tree_util.keystr(path)


def test_stacked_layers_take_them_too(plain):
    loss, params, (value, _) = plain
    found, _ = graded(dataclasses.replace(loss, chunk=7, remat="layer"), stack_layers(params))
    assert float(found) == pytest.approx(float(value), rel=1e-6)


def test_the_loss_is_the_weighted_mean_inside_documents():
    """Row by row and document by document, each alone in a row of its own."""
    loss, params = NextTokenLoss(CONFIG), init(CONFIG, jax.random.key(1))
    total, count = 0.0, 0.0
    rows = jax.jit(lambda batch: loss.rows(params, batch, state={}))
    nll, weights = rows(BATCH)
    for row, ids in enumerate(BATCH["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            alone = {name: BATCH[name][row : row + 1, ids == segment] for name in ("tokens", "weights")}
            one, weight = rows(alone)
            assert weight[0] == alone["weights"][0, 1:].sum()
            total, count = total + float(one[0]), count + float(weight[0])
    assert count == weights.sum() and float(nll.sum()) == pytest.approx(total, rel=1e-5)
    chunked = jax.jit(lambda batch: dataclasses.replace(loss, chunk=5).rows(params, batch, state={}))(BATCH)
    chex.assert_trees_all_close(chunked, (nll, weights), rtol=1e-5)
    assert float(graded(loss, params)[0]) == pytest.approx(total / count, rel=1e-5)


def temporaries(compile_, config, B, T, **options):
    """Bytes that the compiled gradient holds beside its arguments and results."""
    loss, shapes = NextTokenLoss(config, **options), jax.eval_shape(lambda: init(config, jax.random.key(0)))
    run = jax.jit(jax.grad(lambda p, batch: loss(p, batch, jax.random.key(0), state={})[0]))
    batch = {"tokens": jax.ShapeDtypeStruct((B, T + 1), "int32")}
    return compile_(run, shapes, batch)


def test_logits_of_a_chunk_are_alive_at_a_time():
    config, B, T = dataclasses.replace(CONFIG, layers=1, vocab=8192, positions=256), 2, 256

    def compile_(run, *arguments):
        return run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = (temporaries(compile_, config, B, T, chunk=chunk) for chunk in (None, 16))
    logits = B * T * config.vocab * 4
    # Once all logits, against a chunk's and their gradient and the matrix's own in float32.
    predicted = logits - 2 * logits * 16 // T - config.vocab * config.width * 4
    assert whole - chunked > 0.9 * predicted


@pytest.mark.slow
@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_layers_that_are_computed_again_keep_less_on_a_gpu():
    """XLA's CPU compiler takes `jax.checkpoint` apart again: what it saves is seen in a GPU's program."""
    config = dataclasses.replace(
        CONFIG, width=512, ffn=2048, layers=6, heads=8, kv_heads=8, head_dim=64, positions=1024, dtype="bfloat16",
    )  # fmt: skip
    B, T = 8, 512

    def compile_(run, *arguments):
        return aot.compile(run, *arguments, mesh=aot.cluster("h200:1x1x1")).bytes.temporaries

    kept = {name: temporaries(compile_, config, B, T, remat=name) for name in (None, "products", "layer")}
    assert kept["layer"] < kept["products"] < kept[None], kept
    inside = config.layers * B * T * config.ffn * 2
    assert kept[None] - kept["layer"] > 2 * inside, "at least gate and up of every layer"


@pytest.mark.parametrize("options, message", [
    ({"remat": "layers"}, "loss.remat='layers' is unknown. Known: layer, attention, products. Did you mean 'layer'"),
    ({"chunk": 0}, "loss.chunk=0 must be at least 1"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        NextTokenLoss(CONFIG, **options)
