"""Perplexity of a file: against a loop over its tokens, each with the context that its window gives it."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.perplexity import get_config
from experiments.perplexity import describe, run, windows
from jaxfw.core.errors import InputError
from jaxfw.data import train_bpe
from jaxfw.generate import LM
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.report import ratio_interval

CONFIG = DecoderConfig(
    vocab=300, width=16, ffn=24, layers=1, heads=2, kv_heads=1, head_dim=8, positions=24, init_std=0.5
)  # fmt: skip
TEXT = "Returns the number of items in a list; raises é ValueError if there are none.\n" * 2


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perplexity")
    tokenizer = train_bpe([TEXT], vocab_size=300)
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    model = LM(CONFIG, params, tokenizer, (tokenizer.eos_id or 0,))
    model.save(folder / "model")
    (folder / "text").write_text(TEXT, encoding="utf-8")
    return model, folder


def config(folder, arg="", **changes):
    c = get_config(arg).unlock()
    c.update({"model": str(folder / "model"), "file": str(folder / "text"), "batch": 3, "chunk": 7} | changes)
    return c


@pytest.mark.parametrize("stride", [5, 24])
def test_each_token_with_the_context_of_its_window(lm, stride):
    """Token by token: the tokens before it from the start of the first window that reaches it."""
    model, folder = lm
    tokens, context = np.array(model.tokenizer.encode(TEXT)), CONFIG.positions
    assert len(tokens) > 2 * context
    logits = jax.jit(lambda t: forward(CONFIG, model.params, t).logits)
    nll = 0.0
    for t in range(1, len(tokens)):
        start = 0 if t <= context else math.ceil((t - context) / stride) * stride
        row = np.zeros((1, context), np.int32)
        row[0, : t - start] = tokens[start:t]
        at = np.asarray(logits(row)[0, t - start - 1], np.float64)
        nll += np.logaddexp.reduce(at) - at[tokens[t]]
    got = run(config(folder, stride=stride))["metrics"]
    assert got["nats_per_token"]["value"] == pytest.approx(nll / (len(tokens) - 1), rel=1e-6)
    assert got["perplexity"]["value"] == pytest.approx(math.exp(nll / (len(tokens) - 1)), rel=1e-6)
    assert got["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert got["tokens"] == len(tokens) - 1 and got["bytes"] == len(TEXT.encode()) > len(TEXT)
    assert got["perplexity"]["low"] < got["perplexity"]["value"] < got["perplexity"]["high"]


@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_every_token_is_scored_once_with_enough_before_it(n, context, data):
    stride = data.draw(st.integers(1, context))
    tokens, scored = np.arange(n), []
    for batch in windows(tokens, context, stride, batch=2):
        assert batch["tokens"].shape == batch["weights"].shape == (2, context + 1)
        for row, weights in zip(batch["tokens"], batch["weights"], strict=True):
            assert weights[0] == 0
            for at in np.flatnonzero(weights):
                scored.append(int(row[at]))
                assert at >= min(context - stride + 1, scored[-1])
                np.testing.assert_array_equal(row[:at], np.arange(row[0], row[0] + at))
    assert scored == list(range(1, n))


def test_an_interval_of_a_ratio_by_drawing_windows_again():
    rng = np.random.default_rng(0)
    count = rng.integers(5, 20, 400).astype(float)
    nll = count * rng.normal(3, 0.5, 400)
    drawn = rng.integers(0, 400, (4000, 400))
    low, high = np.quantile(nll[drawn].sum(1) / count[drawn].sum(1), [0.025, 0.975])
    found = ratio_interval(nll, count)
    assert found.value == pytest.approx(nll.sum() / count.sum())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    one = ratio_interval(nll[:1], count[:1])
    assert one.low == one.value == one.high


def test_the_smoke_configuration_and_what_it_says_first(lm):
    _, folder = lm
    c = config(folder, "smoke", context=16, most_tokens=40)
    assert describe(c)["context"] == 16 and describe(c)["stride"] == 8
    result = run(c)
    assert result["metrics"]["tokens"] == 39 and result["metrics"]["windows"] == 4
    assert "Perplexity of text by model" in result["report"]["title"]


@pytest.mark.parametrize("changes, message", [
    ({"model": ""}, "config.model='' is empty: name a Hugging Face directory"),
    ({"file": ""}, "config.file='' is empty: name a text file"),
    ({"file": "/nowhere"}, "config.file='/nowhere' cannot be read"),
    ({"context": 25}, "config.context=25 exceeds the model's 24 positions"),
    ({"context": 8, "stride": 9}, "config.stride=9 exceeds the context of 8 tokens: some would not be scored"),
    ({"stride": -1}, "config.stride=-1 must be at least 1, or 0"),
    ({"batch": 0}, "config.batch=0 must be at least 1"),
    ({"most_tokens": 1}, "has 1 token: there is nothing to predict"),
])  # fmt: skip
def test_wrong_input_is_refused(lm, changes, message):
    with pytest.raises(InputError, match=message):
        run(config(lm[1], **changes))
