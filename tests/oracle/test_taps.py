"""What taps collect is what hooks on transformers' modules see, by the names of docs/taps.md; edits likewise."""

import contextlib
import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from transformers.models.llama import modeling_llama  # noqa: E402

from jaxfw.models import Collect, Edit, attention_spec, forward  # noqa: E402
from jaxfw.models.taps import REDUCTIONS, SITES  # noqa: E402
from jaxfw.ops.attention_rows import attention_rows, attention_summary  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "taps.md").read_text(encoding="utf-8")
NAMED = {row[1]: row[2] for row in re.finditer(r"^\| `([\w/]+)` \|(?:[^|]*\|){3}([^|]*)\|", PAGE, flags=re.M)}
CASE = "default, biased"  # grouped heads, tied, three padded rows
TOLERANCE = 2e-5


def hook_into(model, site, layer, function):
    """`function(x)` at a site of the model: what it returns goes on, if anything. A handle with `remove`."""
    side, name = re.match(r" *(output|input) of `([\w.{}]+)`", NAMED[site]).groups()
    module = model.model.get_submodule(name.format(i=layer))
    if side == "input":
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: replace_first(args, kwargs, function), with_kwargs=True
        )
    return module.register_forward_hook(lambda module, args, out: replace_out(out, function))


def replace_first(args, kwargs, function):
    new = function(args[0])
    return None if new is None else ((new, *args[1:]), kwargs)


def replace_out(out, function):
    is_tuple = isinstance(out, tuple)
    new = function(out[0] if is_tuple else out)
    return new if new is None or not is_tuple else (new, *out[1:])


@contextlib.contextmanager
def rotated(seen):
    """The first and second result of every call of `apply_rotary_pos_emb`, in the order of layers."""
    real = modeling_llama.apply_rotary_pos_emb

    def record(*args, **options):
        q, k = real(*args, **options)
        seen["attn/q"].append(q.transpose(1, 2))
        seen["attn/k"].append(k.transpose(1, 2))
        return q, k

    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", record):
        yield


@pytest.fixture(scope="module")
def hooked(oracle):
    """{site: a list over layers} of transformers' values, and its attention weights of every layer."""
    built = oracle(CASE)
    model, config = built.model, built.config
    seen = {site: [] for site in SITES if not site.startswith("moe/")}
    sites = [site for site in seen if " of `" in NAMED[site] and "apply_rotary" not in NAMED[site]]
    handles = [
        hook_into(model, site, i, lambda x, site=site: seen[site].append(x.detach()))
        for site in sites
        for i in (range(config.layers) if SITES[site].in_layers else [None])
    ]
    with rotated(seen), torch.no_grad():
        tokens, mask = torch.from_numpy(built.tokens).long(), torch.from_numpy(built.valid).long()
        out = model(input_ids=tokens, attention_mask=mask, output_attentions=True)
    for handle in handles:
        handle.remove()
    weights = [x.double() for x in out.attentions]
    for i in range(config.layers):  # lse from transformers' own q and k
        q, k = seen["attn/q"][i].double(), seen["attn/k"][i].double()
        k = k.repeat_interleave(config.heads // config.kv_heads, dim=2)
        logits = torch.einsum("bthd,bshd->bhts", q, k) * config.head_dim**-0.5
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        lse = torch.logsumexp(logits.masked_fill(later, -torch.inf), dim=-1)
        seen["attn/lse"].append(lse.transpose(1, 2))
    return {site: [x.numpy() for x in values] for site, values in seen.items()}, [x.numpy() for x in weights]


@pytest.fixture(scope="module")
def collected(oracle):
    """{(site, reduction): what is collected}."""
    built = oracle(CASE)
    taps = [Collect(site, reduce=r) for site in SITES if not site.startswith("moe/") for r in REDUCTIONS]
    run = jax.jit(lambda params: forward(built.config, params, built.tokens, lengths=built.lengths, taps=taps).taps)
    return {(tap.site, tap.reduce): x for tap, x in zip(taps, run(built.params), strict=True)}


def close(got, expected, tolerance=TOLERANCE):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_the_page_names_every_site():
    assert set(NAMED) == set(SITES)


@pytest.mark.parametrize("site", [site for site in SITES if not site.startswith("moe/")])
def test_collected_values_are_what_hooks_see(oracle, hooked, collected, site):
    """Plain, mean and second moment over valid tokens: at mlp/key, the X^T X of model editing."""
    valid, values = oracle(CASE).valid, hooked[0][site]
    assert len(values) == (oracle(CASE).config.layers if SITES[site].in_layers else 1)
    for i, x in enumerate(values):
        here = (lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)) if SITES[site].in_layers else (lambda x: x)
        plain = np.asarray(here(collected[site, None]))
        x = x.reshape(plain.shape)
        close(plain[valid], x[valid])
        rows = x[valid].reshape(valid.sum(), -1).astype(np.float64)
        mean, second = here(collected[site, "mean"]), here(collected[site, "second_moment"])
        assert mean.count == second.count == valid.sum()
        assert np.abs(mean.value - rows.mean(axis=0)).max() <= TOLERANCE * np.abs(rows).max()
        close(second.value, rows.T @ rows / len(rows))


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_rows_and_summaries_equal_eager_attention(oracle, hooked, collected, layer):
    built, weights = oracle(CASE), hooked[1][layer]
    scale, keys = attention_spec(built.config).scale, jnp.swapaxes(collected["attn/k", None][layer], 1, 2)
    q, lse = collected["attn/q", None][layer], collected["attn/lse", None][layer]
    positions = np.array([[0, 143, 60], [76, 1, -1], [8, 0, -1]])
    at = np.maximum(positions, 0)
    q_at, lse_at = (jnp.stack([x[b, at[b]] for b in range(3)]) for x in (q, lse))
    rows = attention_rows(q_at, keys, lse_at, positions=positions, scale=scale)
    for b, p in np.ndindex(positions.shape):
        position = positions[b, p]
        close(rows[b, :, p], weights[b, :, position]) if position >= 0 else np.testing.assert_array_equal(
            rows[b, :, p], 0
        )
    weights = weights * built.valid[:, None, :, None]
    regions = np.arange(weights.shape[-1])[None] // np.array([[50], [30], [4]])
    out = attention_summary(q, keys, lse, lengths=built.lengths, scale=scale, regions=jnp.asarray(regions), n_regions=6)
    close(out.mass, weights.sum(axis=2))
    close(out.entropy, -(weights * np.log(np.where(weights > 0, weights, 1))).sum(axis=-1))
    close(out.regions, np.stack([(weights * (regions == r)[:, None, None]).sum(axis=-1) for r in range(6)], axis=-1))


def edited_logits(built, site, layer, function):
    handle = hook_into(built.model, site, layer, function)
    with torch.no_grad():
        tokens, mask = torch.from_numpy(built.tokens).long(), torch.from_numpy(built.valid).long()
        logits = built.model(input_ids=tokens, attention_mask=mask).logits.numpy()
    handle.remove()
    return logits


@pytest.mark.parametrize("site", ["resid/in", "attn/head_out", "attn/out", "mlp/key", "resid/out"])
def test_edits_are_what_hooks_that_return_something_do(oracle, site):
    """A steering vector at some positions, one head left out, feed-forward keys and others set."""
    built, rng = oracle(CASE), np.random.default_rng(0)
    config = built.config
    size = config.ffn if site == "mlp/key" else config.width
    value, pos = rng.normal(size=size).astype(np.float32), jnp.array([[3, 100], [0, -1], [8, 2]])
    if site == "attn/head_out":
        keep = np.ones((config.heads, 1), np.float32)
        keep[5] = 0
        edit = Edit(site, keep, "scale", layers=(0, 0))
        factor = torch.from_numpy(keep.repeat(config.head_dim, axis=1).reshape(-1))
        function = lambda x: x * factor  # noqa: E731
    else:
        edit = Edit(site, value, "add" if site == "resid/out" else "set", layers=(0, 0), pos=pos)

        def function(x):
            x = x.clone()
            for b, p in ((b, int(p)) for b, row in enumerate(pos) for p in row if p >= 0):
                x[b, p] = torch.from_numpy(value) + (x[b, p] if site == "resid/out" else 0)
            return x

    expected = edited_logits(built, site, 0, function)
    run = jax.jit(lambda params, edit: forward(config, params, built.tokens, lengths=built.lengths, taps=[edit]).logits)
    got = np.asarray(run(built.params, edit))
    assert np.abs(got - expected)[built.valid].max() <= 1e-5 * built.deviation
    assert np.abs(expected - built.logits)[built.valid].max() > 0.01 * built.deviation
