"""`LM`: text in, text out, on small models with random weights and a tokenizer trained on a few docstrings."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfw
from jaxfw.core.errors import InputError, RunError
from jaxfw.data import train_bpe
from jaxfw.generate import engine, lm, scoring
from jaxfw.models import DecoderConfig, forward, init
from jaxfw.models.cache import FullCache
from jaxfw.weights import save

TEXTS = [text or "" for text in (textwrap.__doc__, textwrap.dedent.__doc__, textwrap.indent.__doc__, json.__doc__)]
TOKENIZER = train_bpe(TEXTS, vocab_size=320)
# Weights large enough that the likeliest token is never a near tie.
CONFIG = DecoderConfig(
    vocab=320, width=32, ffn=64, layers=2, heads=4, kv_heads=2, head_dim=8, positions=128, init_std=0.4
)
NEW = 20
fresh = jax.jit(lambda config: init(config, jax.random.key(0)), static_argnums=0)
PROMPTS = ["Remove any common leading whitespace", "é", "JSON is a subset of the literal syntax of a language.\n\n"]


@pytest.fixture(scope="module")
def m():
    return lm.LM(CONFIG, fresh(CONFIG), TOKENIZER, (TOKENIZER.eos_id,))


@pytest.fixture
def directory(m, tmp_path):
    return m.save(tmp_path / "model")


def refused(call, *parts):
    with pytest.raises(InputError) as caught:
        call()
    assert all(str(part) in str(caught.value) for part in parts), str(caught.value)


def change(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


# --- generate


def test_the_text_is_that_of_the_engines_tokens(m):
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    out = engine.generate(CONFIG, m.params, ids, max_new_tokens=NEW, stop_ids=m.stop_ids)
    assert m.generate(PROMPTS, max_new_tokens=NEW) == [TOKENIZER.decode(row) for row in out.tokens]


def test_a_text_gives_a_text_and_a_list_a_list(m):
    alone = m.generate(PROMPTS[0], max_new_tokens=NEW)
    assert isinstance(alone, str) and m.generate([PROMPTS[0]], max_new_tokens=NEW) == [alone]


def test_a_row_alone_equals_the_row_in_a_padded_batch(m):
    batch = m.generate(PROMPTS, max_new_tokens=NEW)
    assert [m.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS] == batch
    assert len(set(batch)) == 3


def test_draws_are_those_of_the_key(m):
    def draw(seed, **options):
        return m.generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, key=jax.random.key(seed), **options)

    first = draw(1)
    assert draw(1) == first and draw(2) != first
    assert m.generate(PROMPTS[:1], max_new_tokens=NEW, temperature=1.0, key=jax.random.key(1)) == first[:1]


def test_filters_reach_the_engine(m):
    """Each alone would do: one token is left to draw from."""
    greedy = m.generate(PROMPTS[0], max_new_tokens=NEW)
    wide = {"temperature": 1.0, "top_k": 320, "top_p": 1.0, "min_p": 0.0}
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert m.generate(PROMPTS[0], max_new_tokens=NEW, **{**wide, **narrow}) == greedy, narrow
    assert m.generate(PROMPTS[0], max_new_tokens=NEW, **wide) != greedy


def test_streaming_pieces_join_to_the_texts(m):
    got = []
    texts = m.generate(PROMPTS, max_new_tokens=NEW, on_text=lambda row, piece: got.append((row, piece)))
    for i, text in enumerate(texts):
        assert "".join(piece for row, piece in got if row == i) == text
    assert all(piece for _, piece in got) and len(got) > 3


def test_the_stop_token_is_not_in_the_text(m):
    """Whatever token stops, also one that is ordinary text: the text is what came before it."""
    ids = engine.generate(CONFIG, m.params, [TOKENIZER.encode(PROMPTS[0])], max_new_tokens=NEW).tokens[0]
    stop = max(set(ids), key=ids.index)
    stopped = dataclasses.replace(m, stop_ids=(stop,))
    got = []
    text = stopped.generate(PROMPTS[0], max_new_tokens=NEW, on_text=lambda row, piece: got.append(piece))
    assert text == TOKENIZER.decode(ids[: ids.index(stop)]) == "".join(got)
    assert dataclasses.replace(m, stop_ids=()).generate(PROMPTS[0], max_new_tokens=NEW) == TOKENIZER.decode(ids)


def test_the_empty_text_continues_from_the_beginning(m):
    assert isinstance(m.generate("", max_new_tokens=2), str)


def test_at_most_128_tokens_by_default(m):
    refused(lambda: m.generate("a"), "prompt + new tokens = 2 + 128", "128 positions", "lower max_new_tokens")


@pytest.mark.parametrize(
    ("prompts", "options", "parts"),
    [
        ([], {}, ("prompts is an empty list",)),
        (3, {}, ("prompts=3", "str or a list of str")),
        (["a", 3], {}, ("prompts=['a', 3]", "list of str")),
        ("a", {"max_new_tokens": 0}, ("max_new_tokens=0", "at least 1")),
        ("a", {"temperature": -1}, ("temperature=-1", "above 0", "greedy")),
        ("a", {"top_k": 3}, ("give temperature",)),
        ("a", {"temperature": 1.0, "key": 3}, ("key=3", "jax.random.key(0)", "one for each of 1 rows")),
    ],
)
def test_generate_refuses(m, prompts, options, parts):
    refused(lambda: m.generate(prompts, **{"max_new_tokens": 4, **options}), *parts)


def test_an_empty_prompt_without_a_beginning_token(m):
    bare = train_bpe(TEXTS, vocab_size=300, special_tokens={}, chat_template=None)
    model = dataclasses.replace(m, tokenizer=bare, stop_ids=())
    refused(lambda: model.generate("", max_new_tokens=2), "prompt 0 is empty")
    refused(lambda: model.generate(["a", ""], max_new_tokens=2), "prompt 1 is empty")
    refused(lambda: model.logprobs(["a", ""]), "texts[1] is empty")
    refused(lambda: model.chat([{"role": "user", "content": "a"}]), "no chat template", "generate()")


# --- chat


def test_chat_is_the_rendered_text_continued(m):
    conversation = [{"role": "user", "content": "a"}]
    other = [{"role": "system", "content": "b"}, {"role": "user", "content": "What is JSON?"}]
    all_ = [conversation, other, conversation]
    ids = [TOKENIZER.encode(TOKENIZER.render_chat(x), add_special_tokens=False) for x in all_]
    assert [row.count(TOKENIZER.bos_id) for row in ids] == [1, 1, 1]
    out = engine.generate(CONFIG, m.params, ids, max_new_tokens=NEW, stop_ids=m.stop_ids)
    texts = [TOKENIZER.decode(row) for row in out.tokens]
    got = []
    assert m.chat(conversation, max_new_tokens=NEW) == texts[0]
    assert m.chat(all_, max_new_tokens=NEW, on_text=lambda *piece: got.append(piece)) == texts
    assert "".join(piece for row, piece in got if row == 1) == texts[1]


def test_chat_hands_tools_to_the_template(m):
    tokenizer = train_bpe(TEXTS, vocab_size=320, chat_template="{{ tools[0].name }}")
    model = dataclasses.replace(m, tokenizer=tokenizer)
    messages = [{"role": "user", "content": "a"}]
    expected = m.generate("search", max_new_tokens=8)
    tokenizer_with_bos = train_bpe(TEXTS, vocab_size=320, chat_template="{{ bos_token }}{{ tools[0].name }}")
    assert (
        dataclasses.replace(m, tokenizer=tokenizer_with_bos).chat(
            messages, tools=[{"name": "search"}], max_new_tokens=8
        )
        == expected
    )
    assert model.chat(messages, tools=[{"name": "search"}], max_new_tokens=8) != expected


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ([], "messages is empty"),
        ("hello", "messages='hello' must be a list"),
        ([{"role": "user"}], "messages[0]['content']=None"),
        ([[{"role": "user", "content": "a"}], []], "messages is empty"),
    ],
)
def test_chat_refuses(m, messages, part):
    refused(lambda: m.chat(messages, max_new_tokens=2), part)


# --- logprobs


def expected_logprobs(m, text):
    """A plain causal forward, normalised in float64."""
    ids = TOKENIZER.encode(text)
    padded = jnp.zeros((1, CONFIG.positions), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
    plain = jax.jit(forward, static_argnums=0)(m.config, m.params, padded)
    logits = np.asarray(plain.logits[0, : len(ids)], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(ids) - 1), ids[1:]]


def test_logprobs_equal_a_plain_forward(m):
    texts = [*PROMPTS, TEXTS[1][:60], "a", TEXTS[2][:150], "b", "cd", "efg", "h"]
    got = m.logprobs(texts)
    for text, scores in zip(texts, got, strict=True):
        assert scores.dtype == np.float32 and scores.shape == (len(TOKENIZER.encode(text)) - 1,)
        np.testing.assert_allclose(scores, expected_logprobs(m, text), rtol=0, atol=2e-5)
    np.testing.assert_allclose(m.logprobs(texts[0]), got[0], rtol=0, atol=2e-5)


def test_logprobs_in_blocks_equal_those_in_one(m, monkeypatch):
    """Blocks that do not divide the length, too."""
    tokens = jax.random.randint(jax.random.key(3), (3, 50), 0, CONFIG.vocab)
    lengths = jnp.array([50, 20, 1])
    whole = scoring.logprobs(CONFIG, m.params, tokens, lengths=lengths)
    monkeypatch.setattr(scoring, "LOGIT_TOKENS", 21)
    blocks = jax.jit(scoring.logprobs.__wrapped__, static_argnums=0)(CONFIG, m.params, tokens, lengths=lengths)
    assert whole.shape == blocks.shape == (3, 49)
    np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-5)


def test_long_texts_are_scored_fewer_at_a_time(m, monkeypatch):
    calls = []

    def score(config, params, tokens, *, lengths):
        calls.append(tokens.shape)
        return jnp.zeros((tokens.shape[0], tokens.shape[1] - 1))

    monkeypatch.setattr(scoring, "logprobs", score)
    monkeypatch.setattr(scoring, "SCORED_TOKENS", 256)
    texts = ["a", *["\x01" * 100] * 3, *["b"] * 9]
    assert [len(x) for x in m.logprobs(texts)] == [1, 100, 100, 100, *[1] * 9]
    assert calls == [(2, 128), (2, 128), (8, 32), (1, 32)]


def test_logprobs_compile_once_for_texts_of_like_size(m):
    m.logprobs(["a", "bc", "d"])
    before = scoring.logprobs._cache_size()
    for texts in (["de", "f" * 9, "g"], ["one", "two", "three", "four"], [PROMPTS[1], "x", "y"]):
        m.logprobs(texts)
    assert scoring.logprobs._cache_size() == before


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ([], ("texts is an empty list",)),
        ("", ("texts[0] is empty",)),
        (["a", ""], ("texts[1] is empty",)),
        (None, ("texts=None", "a str or a list of str")),
        (["a", "\x01" * 200], ("texts[1] has 201 tokens", "128 positions", "pieces")),
    ],
)
def test_logprobs_refuse(m, texts, parts):
    refused(lambda: m.logprobs(texts), *parts)


# --- directories


def test_a_saved_model_answers_the_same(m, directory):
    read = jaxfw.load(directory)
    assert read.config == m.config and read.stop_ids == m.stop_ids
    assert read.generate(PROMPTS, max_new_tokens=NEW) == m.generate(PROMPTS, max_new_tokens=NEW)
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_a_model_that_is_saved_again_keeps_its_files(directory, tmp_path):
    change(directory / "config.json", bos_token_id=0, eos_token_id=[1, 2])
    change(directory / "generation_config.json", eos_token_id=[1, 5], temperature=0.6, bos_token_id=7)
    again = jaxfw.load(directory).save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        assert (again / name).read_bytes() == (directory / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((again / name).read_text()) == json.loads((directory / name).read_text())


def test_save_never_overwrites_and_leaves_nothing_half_done(m, directory, tmp_path):
    refused(lambda: m.save(directory), "not empty")
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, (3, 4)),
        ({"eos_token_id": 3}, {}, (3,)),
        ({}, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": None}, {"eos_token_id": None}, (1,)),
        (None, {}, (1,)),
    ],
)
def test_where_stop_ids_come_from(directory, generation, config, expected):
    attributes = json.loads((directory / "config.json").read_text())
    attributes.pop("eos_token_id")
    (directory / "config.json").write_text(json.dumps(attributes | config))
    (directory / "generation_config.json").unlink()
    if generation is not None:
        change(directory / "generation_config.json", **generation)
    assert jaxfw.load(directory).stop_ids == expected


def test_no_stop_ids_at_all(tmp_path):
    bare = train_bpe(TEXTS, vocab_size=300, special_tokens={})
    model = lm.LM(CONFIG, fresh(CONFIG), bare, ())
    assert jaxfw.load(model.save(tmp_path / "model")).stop_ids == ()


@pytest.mark.parametrize(
    ("break_", "parts"),
    [
        (lambda d: change(d / "generation_config.json", eos_token_id="end"), ("generation_config.json", "'end'")),
        (lambda d: (d / "generation_config.json").write_text("{"), ("generation_config.json", "not valid JSON")),
        (lambda d: (d / "tokenizer.json").unlink(), ("no tokenizer.json", "jaxfw.weights.load")),
        (lambda d: (d / "config.json").unlink(), ("config.json", "does not exist")),
        (lambda d: (d / "model.safetensors").unlink(), ("model.safetensors",)),
    ],
)
def test_load_refuses(directory, break_, parts):
    break_(directory)
    refused(lambda: jaxfw.load(directory), *parts)


def test_a_directory_that_is_not_there(tmp_path):
    refused(lambda: jaxfw.load(tmp_path / "nowhere"), "nowhere is not a directory")


def test_a_tokenizer_larger_than_the_vocabulary(m, tmp_path):
    small = dataclasses.replace(CONFIG, vocab=319)
    directory = save(tmp_path / "small", small, fresh(small), extra=TOKENIZER.files)
    refused(lambda: jaxfw.load(directory), "ids up to 319", "holds 319", "add rows")


def test_extra_files_may_lie_in_folders(m, tmp_path):
    extra = {"a/b.txt": "é", "c.bin": b"\x00"}
    directory = save(tmp_path / "model", CONFIG, m.params, extra=extra)
    assert (directory / "a" / "b.txt").read_text("utf-8") == "é" and (directory / "c.bin").read_bytes() == b"\x00"


def test_dtypes_are_passed_on(directory):
    model = jaxfw.load(directory, param_dtype="bfloat16", dtype="float32", softmax_dtype="bfloat16")
    assert (model.config.param_dtype, model.config.dtype, model.config.softmax_dtype) == (
        "bfloat16", "float32", "bfloat16",
    )  # fmt: skip
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}


def test_a_model_prints_short(m):
    assert len(repr(m)) < 1000 and "width=32" in repr(m)


# --- import jaxfw


def test_names_are_all_there_and_loaded_when_used():
    program = """
import sys, jaxfw
heavy = {"jax", "flax", "tokenizers", "safetensors", "orbax", "matplotlib", "jinja2", "optax", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert set(jaxfw.__all__) <= set(dir(jaxfw))
for name in jaxfw.__all__:
    getattr(jaxfw, name)
from jaxfw import *
assert jaxfw.load is load and jaxfw.forward is forward and jaxfw.generate.generate is generate_tokens
assert not {"orbax", "matplotlib", "jinja2"} & set(sys.modules)
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'foward'; it has LM"):
        jaxfw.foward  # noqa: B018


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert jaxfw.__version__ == version("jaxfw")


# --- what a caller may give and forget


def test_one_room_shares_one_decode_loop_between_prompts_of_all_sizes(m):
    m.generate("a", max_new_tokens=3, room=96)
    before = engine.decode._cache_size()
    for words in (1, 5, 12, 20):
        m.generate("word " * words, max_new_tokens=3 + words, room=96)
    assert engine.decode._cache_size() == before


def test_a_key_a_row(m):
    keys = jax.random.split(jax.random.key(5), 3)
    batch = m.generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, key=keys)
    alone = [m.generate([PROMPTS[b]], max_new_tokens=NEW, temperature=1.0, key=keys[b : b + 1])[0] for b in range(3)]
    assert batch == alone
    refused(lambda: m.generate(PROMPTS, max_new_tokens=3, temperature=1.0, key=keys[:2]), "one for each of 3 rows")


def test_temperature_zero_is_greedy(m):
    assert m.generate(PROMPTS, max_new_tokens=NEW, temperature=0) == m.generate(PROMPTS, max_new_tokens=NEW)


def test_logits_that_are_not_finite_are_told(m):
    spoilt = dataclasses.replace(m, params=jax.tree.map(lambda x: x * jnp.nan, m.params))
    with pytest.raises(RunError, match=r"logits are NaN or infinite.*dtype='float32'"):
        spoilt.generate("a", max_new_tokens=3)


def test_suggested_sampling_is_told_once_and_not_followed(directory, capsys):
    change(directory / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    texts = {lm.load(directory).generate("a", max_new_tokens=NEW) for _ in range(2)}
    said = capsys.readouterr().err
    assert len(texts) == 1 and said.count("suggests temperature=0.6, top_p=0.9; generate() is greedy unless") == 1


def test_the_workdir_of_a_run_leads_to_its_model(directory):
    refused(lambda: lm.load(directory.parent), "is the workdir of a run", directory)


def test_a_cache_needs_its_policy(m):
    tokens = jnp.ones((1, 4), jnp.int32)
    cache = forward(CONFIG, m.params, tokens, policy=FullCache()).cache
    refused(
        lambda: forward(CONFIG, m.params, tokens, cache=cache), "a cache is given without its policy", "FullCache()"
    )
