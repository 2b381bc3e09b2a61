"""`LM` with stop strings, samples, details, a shared prefix, and what generation_config.json says."""

import dataclasses
import json
import textwrap

import jax
import numpy as np
import pytest

import jaxfw
from jaxfw.core.errors import InputError
from jaxfw.data import train_bpe
from jaxfw.generate import Answer, engine, lm
from jaxfw.generate.suggestions import stop_strings_of, suggested_sampling
from jaxfw.models import DecoderConfig, init
from jaxfw.models.cache import FullCache, RingCache

TEXTS = [text or "" for text in (textwrap.__doc__, textwrap.dedent.__doc__, textwrap.indent.__doc__, json.__doc__)]
TOKENIZER = train_bpe(TEXTS, vocab_size=320)
CONFIG = DecoderConfig(
    vocab=320, width=32, ffn=64, layers=1, heads=4, kv_heads=2, head_dim=8, positions=160, init_std=0.4
)
PROMPTS = ["Remove any common leading whitespace", "JSON is a subset of the literal syntax"]
NEW, ROOM = 34, 96  # more than one chunk
DRAWN = {"temperature": 1.0, "key": jax.random.key(4), "max_new_tokens": NEW, "room": ROOM}


@pytest.fixture(scope="module", autouse=True)
def fast_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def m():
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    return lm.LM(CONFIG, params, TOKENIZER, (TOKENIZER.eos_id or 0,))


@pytest.fixture(scope="module")
def texts(m):
    """What nothing stops."""
    out = m.generate(PROMPTS, max_new_tokens=NEW, room=ROOM)
    assert all(len(text) > 12 for text in out)
    return out


def run(m, prompts=PROMPTS, **options):
    return m.generate(prompts, **{"max_new_tokens": NEW, "room": ROOM} | options)


# --- stop strings


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_text_ends_before_its_stop_string_wherever_tokens_end(m, texts, width):
    """Strings cut out of the text at many places, most of them across tokens; the other row may go on."""
    for start in (0, 3, len(texts[0]) - width):
        stop, pieces = texts[0][start : start + width], []
        got = run(m, stop=[stop], on_text=lambda row, piece, pieces=pieces: pieces.append((row, piece)))
        assert got == [text.partition(stop)[0] for text in texts]
        for row, text in enumerate(got):
            assert "".join(piece for b, piece in pieces if b == row) == text, "nothing is told and taken back"


def test_rows_that_stop_are_done_on_the_device(m, texts):
    counts = []

    def counting(*arguments, **options):
        state, drawn = decode(*arguments, **options)
        counts.append(int(np.sum(np.asarray(drawn) >= 0)))
        return state, drawn

    decode = engine.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "decode", counting)
        run(m, PROMPTS, max_new_tokens=100, room=160, stop=[texts[0][:2], texts[1][:2]])
    assert len(counts) == 1, "both have stopped within the first chunk"


def test_the_models_stop_strings_hold_in_every_call(m, texts):
    stopping = dataclasses.replace(m, stop_strings=(texts[0][4:7],))
    assert run(stopping)[0] == texts[0].partition(texts[0][4:7])[0]
    assert run(stopping, stop=texts[0][2:4])[0] == texts[0].partition(texts[0][2:4])[0]


# --- details


def test_answers_say_what_ended_them(m, texts):
    stop = texts[0][3:5]
    plain, stopped = run(m, details=True), run(m, details=True, stop=stop)
    assert [one.text for one in plain] == texts and {one.finish_reason for one in plain} == {"length"}
    first = stopped[0]
    assert isinstance(first, Answer) and (first.text, first.finish_reason) == (texts[0].partition(stop)[0], "stop")
    assert first.tokens == plain[0].tokens[: len(first.tokens)] and stop in TOKENIZER.decode(first.tokens)
    assert stop not in TOKENIZER.decode(first.tokens[:-1]), "the last token is the one that completed it"
    for one in (*plain, *stopped):
        assert one.logprobs.dtype == np.float32 and one.logprobs.shape == (len(one.tokens),)
        assert one.prefill_seconds > 0 and one.decode_seconds > 0
    ending = dataclasses.replace(m, stop_ids=(plain[1].tokens[4],))
    assert run(ending, PROMPTS[1], details=True).finish_reason == "stop"


def test_logprobs_of_answers_are_those_of_scoring(m):
    answer = run(m, PROMPTS[0], details=True)
    prompt = TOKENIZER.encode(PROMPTS[0])
    rows = lm.score_rows(CONFIG, m.params, [prompt + list(answer.tokens)])
    np.testing.assert_allclose(answer.logprobs, rows[0][len(prompt) - 1 :], atol=1e-4)


# --- samples


def test_n_gives_a_list_for_each_prompt(m):
    pieces: dict[int, str] = {}
    many = m.generate(PROMPTS, n=3, on_text=lambda i, x: pieces.update({i: pieces.get(i, "") + x}), **DRAWN)
    assert [len(samples) for samples in many] == [3, 3] and len({text for samples in many for text in samples}) == 6
    assert [samples[0] for samples in many] == m.generate(PROMPTS, **DRAWN)
    assert [pieces[i] for i in range(6)] == [text for samples in many for text in samples]
    assert m.generate(PROMPTS[0], n=3, **DRAWN) == many[0] and m.generate(PROMPTS, n=1, **DRAWN) == [
        x[:1] for x in many
    ]
    assert [one.text for one in m.generate(PROMPTS[0], n=3, details=True, **DRAWN)] == many[0]


# --- a shared prefix

DOCUMENT = "JSON is a subset of the literal syntax of"


def test_a_prompt_behind_a_prefix_is_that_of_the_joined_text(m):
    begun = m.prefix(DOCUMENT, room=ROOM)
    ends = [" a language.", " Python, and", ""]
    joined = run(m, [DOCUMENT + end for end in ends])
    assert m.generate(ends, prefix=begun, max_new_tokens=NEW) == joined
    assert m.generate(ends[0], prefix=begun, max_new_tokens=NEW) == joined[0]


def test_where_a_token_would_reach_across_the_border_the_prompt_is_encoded_by_itself(m):
    cut = len("JSON is a subset of th")  # inside of a token
    begun, end = m.prefix(DOCUMENT[:cut], room=ROOM), DOCUMENT[cut:]
    assert TOKENIZER.encode(DOCUMENT)[: len(begun.tokens)] != list(begun.tokens)
    ids = [*begun.tokens, *TOKENIZER.encode(end, add_special_tokens=False)]
    expected = engine.generate(CONFIG, m.params, [ids], max_new_tokens=NEW, room=ROOM).tokens[0]
    assert m.generate(end, prefix=begun, max_new_tokens=NEW) == TOKENIZER.decode(expected)


def test_logprobs_behind_a_prefix_are_the_end_of_those_of_the_joined_texts(m):
    begun, ends = m.prefix(DOCUMENT, room=ROOM), [" a language.", " Python"]
    for end, ours, whole in zip(ends, m.logprobs(ends, prefix=begun), m.logprobs([DOCUMENT + x for x in ends])):
        assert len(ours) == len(TOKENIZER.encode(DOCUMENT + end)) - len(begun.tokens)
        np.testing.assert_allclose(ours, whole[-len(ours) :], atol=1e-4)


def test_a_conversation_goes_on_from_its_rendered_beginning(m):
    system = [{"role": "system", "content": "Be short."}]
    conversations = [[*system, {"role": "user", "content": text}] for text in ("a", "What?")]
    begun = m.prefix(system, room=150, policy=RingCache(150))
    expected = m.chat(conversations, max_new_tokens=5, room=150, policy=RingCache(150))
    assert m.chat(conversations, max_new_tokens=5, prefix=begun) == expected
    with pytest.raises(InputError, match="does not begin with the prefix: give it whole"):
        m.chat(conversations[0][1:], max_new_tokens=5, prefix=begun)


# --- generation_config.json


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 1.0, "min_p": 0.05}, 
         {"temperature": 0.6, "top_k": 20, "min_p": 0.05}),
        ({"repetition_penalty": 1.1, "temperature": 0.7}, {"repetition_penalty": 1.1}),
        ({"do_sample": True, "repetition_penalty": 1.0, "top_k": None}, {"temperature": 1.0}),
    ],
)  # fmt: skip
def test_what_a_file_suggests(m, generation, expected):
    assert suggested_sampling(generation) == expected
    assert dataclasses.replace(m, generation=generation).suggested == expected


def test_a_directory_says_how_its_texts_end_and_are_drawn(m, tmp_path, capsys):
    generation = {
        "do_sample": True, "temperature": 0.8, "repetition_penalty": 1.2, "stop_strings": ["\n\n", "###"],
        "num_beams": 4, "no_repeat_ngram_size": 0, "min_new_tokens": 5, "bad_words_ids": [[3]], "typical_p": 1.0,
    }  # fmt: skip
    directory = dataclasses.replace(m, generation=generation).save(tmp_path / "model")
    read = jaxfw.load(directory)
    jaxfw.load(directory)
    said = capsys.readouterr().err
    assert said.count("asks for num_beams=4, bad_words_ids=[[3]], min_new_tokens=5, which is not done here") == 1
    assert said.count("suggests temperature=0.8, repetition_penalty=1.2; generate() is greedy unless") == 1
    assert read.stop_strings == ("\n\n", "###") and read.suggested == {"temperature": 0.8, "repetition_penalty": 1.2}
    drawn = run(read, **read.suggested)
    assert drawn == run(dataclasses.replace(m, stop_strings=("\n\n", "###")), temperature=0.8, repetition_penalty=1.2)
    again = read.save(tmp_path / "again")
    name = "generation_config.json"
    assert json.loads((again / name).read_text()) == json.loads((directory / name).read_text())


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 3}, "stop=3 must be a text or a list of texts"),
        ({"stop": ["a", ""]}, "holds an empty text"),
        ({"stop": [1]}, r"stop=\[1\] must be a text"),
        ({"n": 0, "temperature": 1.0}, "n=0 must be at least 1"),
        ({"n": "2"}, "n='2' must be at least 1"),
        ({"n": 3}, "n=3 samples of greedy decoding"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
        ({"repetition_penalty": -2}, "repetition_penalty=-2 must be above 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(m, options, message):
    with pytest.raises(InputError, match=message):
        run(m, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.prefix("a" * 300), "exceed the model's 160 positions"),
        (lambda m: m.prefix("abc", room=2), "room=2 must be a whole number above"),
        (lambda m: m.prefix([]), "messages is empty"),
        (lambda m: m.logprobs([""], prefix=m.prefix("a", room=40)), r"texts\[0\] is empty"),
        (lambda m: m.logprobs([" b" * 60], prefix=m.prefix("a", room=40)), "has room=40, below"),
        (lambda m: run(m, prefix=m.prefix("a", room=90)), "room=96 is given beside a prefix"),
        (lambda m: m.generate("b", prefix=m.prefix("a", room=90), policy=RingCache(4), max_new_tokens=2), "leave out"),
    ],
)
def test_misuse_of_a_prefix_is_refused(m, call, message):
    with pytest.raises(InputError, match=message):
        call(m)


def test_a_prefix_of_another_model_is_refused(m):
    other = dataclasses.replace(m, params=jax.tree.map(lambda x: x + 0, m.params))
    begun = other.prefix("a", room=90, policy=FullCache())
    for call in (lambda: m.generate("b", prefix=begun, max_new_tokens=2), lambda: m.logprobs("b", prefix=begun)):
        with pytest.raises(InputError, match="another model, or with other parameters"):
            call()


@pytest.mark.parametrize("value", [3, [""], [3], {"a": 1}])
def test_stop_strings_of_a_file_that_are_none_are_refused(value):
    with pytest.raises(InputError, match=r"generation_config.json: stop_strings=.* must be a text or a list"):
        stop_strings_of({"stop_strings": value})


def test_an_unknown_keyword_is_a_type_error(m):
    for call in (m.generate, m.chat):
        with pytest.raises(TypeError, match="temprature"):
            call([{"role": "user", "content": "a"}] if call == m.chat else "a", temprature=1.0)
