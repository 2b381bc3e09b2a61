"""One program with every edit that the table allows, so that tests of taps compile once.

Which of its edits act is a matter of their `rows`, `layers` and `pos`: all are traced.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw.models import Collect, DecoderConfig, Edit, MoEConfig, Moment, forward, init
from jaxfw.models.taps import EDITS, SITES
from tests import numpy_decoder

B, T, P = 2, 6, 2
LENGTHS = np.array([6, 4], np.int32)
DENSE = DecoderConfig(vocab=17, width=16, ffn=12, layers=2, heads=4, kv_heads=2, head_dim=4, positions=32, init_std=0.4)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(experts=3, per_token=2, ffn=6))
# The first layer is dense, the second has experts: every site is somewhere.
MIXED = dataclasses.replace(DENSE, moe=MoEConfig(experts=3, per_token=2, ffn=6, first=1))
TOKENS = np.random.default_rng(0).integers(0, DENSE.vocab, (B, T), np.int32)
VALID = np.arange(T) < LENGTHS[:, None]
WEIGHTS = np.random.default_rng(1).normal(size=(B, T, DENSE.vocab)) * VALID[..., None]

SIZES = {"D": 16, "H": 4, "K": 2, "d": 4, "F": 12, "E": 3, "k": 2}
DIMS = {name: tuple(SIZES[axis] for axis in site.axes.split()) for name, site in SITES.items()}

# Compiling is most of what these tests take, and compiles fastest unoptimised.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def params_of(config):
    """Fresh parameters with norm scales moved off 1."""
    fresh = compiled(init, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), fresh)


def editable(config):
    """Names of the sites of `config` that take edits."""
    absent = {"mlp/key"} if config.moe and config.moe.first == 0 else set()
    return [name for name, site in SITES.items() if site.can_edit and name not in absent]


@functools.cache
def params64(config):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(config))


def numpy_logits(config, edits=(), tokens=TOKENS, lengths=LENGTHS):
    """Of the numpy decoder with these edits (dicts), zero where a token is padding."""
    return numpy_decoder.run(config, params64(config), tokens, lengths, numpy_decoder.editing(edits))


def numpy_loss(config, edits=()):
    """What `loss` should give."""
    return float(np.sum(numpy_logits(config, edits) * WEIGHTS))


def numpy_values(config, edits=(), tokens=TOKENS, lengths=LENGTHS):
    """{site: {layer: x}} behind these edits, zero where a token is padding."""
    seen: dict[str, dict] = {}
    edit = numpy_decoder.editing(edits)

    def hook(site, i, x):
        seen.setdefault(site, {})[i] = x = edit(site, i, x)
        return x

    numpy_decoder.run(config, params64(config), tokens, lengths, hook)
    return seen


def every_edit(config):
    """One edit for each site and operation, with positions, rows and layers, all of them idle."""
    rng = np.random.default_rng(3)
    edits = []
    for site in editable(config):
        for op in EDITS:
            value = rng.normal(size=(B, P, *DIMS[site])).astype(np.float32)
            weight = rng.uniform(0.2, 0.8, (B, P, *[1] * len(DIMS[site]))).astype(np.float32) if op == "lerp" else None
            pos, rows = np.full((B, P), -1, np.int32), np.zeros(B, bool)
            layers = (np.int32(0), np.int32(1)) if SITES[site].in_layers else None
            edits.append(Edit(site, value, op, layers=layers, pos=pos, rows=rows, weight=weight))
    return tuple(edits)


def one_at_a_time(config):
    """`every_edit` stacked: entry n has its n-th edit at work, on one layer, some positions and rows."""
    edits = every_edit(config)
    rng = np.random.default_rng(4)
    settings = []
    for n, edit in enumerate(edits):
        pos = np.stack([rng.permutation(int(length))[:P] for length in LENGTHS]).astype(np.int32)
        pos[n % B, n % P] = -1
        layer = np.int32(0) if edit.site == "mlp/key" else np.int32(n % 2)
        change = {"rows": np.array([True, n % 3 > 0]), "pos": pos}
        if edit.layers is not None:
            change["layers"] = (layer, layer if n % 5 else np.int32(1))
        settings.append((*edits[:n], dataclasses.replace(edit, **change), *edits[n + 1 :]))
    return settings


def as_dicts(edits):
    """For `numpy_decoder.editing`: the edits that act."""
    return [dataclasses.asdict(edit) for edit in edits if np.any(edit.rows)]


def loss(config, params, taps, tokens=TOKENS, lengths=LENGTHS):
    """A weighted sum of the valid logits: it sees every change of them."""
    return jnp.sum(forward(config, params, tokens, lengths=lengths, taps=taps).logits * WEIGHTS)


def all_collects(config):
    """Every reduction at every site of `config`."""
    return tuple(
        Collect(name, reduce=reduce)
        for name, site in SITES.items()
        for reduce in site.reductions
        if (config.moe is not None or not name.startswith("moe/")) and (name in editable(config) or not site.can_edit)
    )


def numpy_collected(config, collects, batches):
    """What these `Collect`s should give over the valid tokens of all `batches` [(tokens, lengths)] together.

    Arrays are those of the last batch. A layer that lacks the site has zeros.
    """
    seen = [(numpy_values(config, (), tokens, lengths), lengths) for tokens, lengths in batches]

    def at_layer(tap, i):
        shape, F = DIMS[tap.site], int(np.prod(DIMS[tap.site]))
        if i not in seen[-1][0][tap.site]:
            if tap.reduce is None:
                return np.zeros((B, T, *shape))
            return Moment(np.zeros(F if tap.reduce == "mean" else (F, F)), np.float64(0))
        if tap.reduce is None:
            return seen[-1][0][tap.site][i]
        rows = [values[tap.site][i][np.arange(T) < lengths[:, None]] for values, lengths in seen]
        x = np.concatenate(rows).reshape(-1, F)
        return Moment(x.mean(axis=0) if tap.reduce == "mean" else x.T @ x / len(x), np.float64(len(x)))

    return [
        stacked([at_layer(tap, i) for i in range(config.layers)]) if SITES[tap.site].in_layers else at_layer(tap, None)
        for tap in collects
    ]


def without_padding(collects, collected, lengths=LENGTHS):
    """What was collected, with zeros where a token is padding."""
    valid = np.arange(T) < np.asarray(lengths)[:, None]
    return [
        x if tap.reduce else np.where(valid.reshape(*valid.shape, *[1] * len(DIMS[tap.site])), x, 0)
        for tap, x in zip(collects, jax.device_get(collected), strict=True)
    ]


def close(got, expected, tolerance=2e-5):
    """Within `tolerance` of each entry, or of the largest."""
    largest = max(1.0, float(np.abs(expected).max())) if np.size(expected) else 1.0
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * largest)


def stacked(settings):
    """A list of taps of the same structure as one, with an axis in front."""
    return jax.tree.map(lambda *x: np.stack(x), *settings)
