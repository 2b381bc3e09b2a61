"""Text to tokens and back, and conversations to text: what is read, what is written, what is refused."""

import json
import os
import subprocess
import sys
import textwrap

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from jaxfw.core.errors import InputError
from jaxfw.data import TextStream, chat, load_tokenizer, save_tokenizer, train_bpe

TEXTS = [textwrap.__doc__, textwrap.dedent.__doc__, textwrap.indent.__doc__, json.__doc__, os.path.relpath.__doc__]
TEXTS = [text or "" for text in TEXTS]
USER = [{"role": "user", "content": "Hi <there> é"}]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, vocab_size=400)


@pytest.fixture
def directory(bpe, tmp_path):
    return save_tokenizer(tmp_path / "tokenizer", bpe)


def sentencepiece_like():
    """Vocabulary, byte fallback and normaliser of LLaMA 2, in small."""
    words = ["▁", "▁hello", "▁a", "a", "b", "h", "e", "l", "o", "▁h", "▁he", "▁hel", "▁hell"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    merges = [("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("▁hel", "l"), ("▁hell", "o"), ("▁", "a")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def write(directory, backend, **config):
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def tokens(tokenizer, text):
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]


# --- byte-level BPE


@hypothesis.given(st.text())
@hypothesis.example("é€😀\x00\r\n\t  \ufeff\u202e")
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_text_comes_back(bpe, text):
    hypothesis.assume(not any(token in text for token in bpe.special_tokens.values()))  # found in the sources
    ids = bpe.encode(text)
    assert ids[0] == bpe.bos_id and max(ids) < bpe.vocab_size
    assert bpe.decode(ids) == text
    assert bpe.decode(bpe.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_training_learns_merges_and_counts_its_tokens(bpe):
    assert bpe.vocab_size == 400
    assert len(bpe.encode(TEXTS[1])) < 0.7 * len(TEXTS[1].encode())
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (0, 1, 2)
    assert train_bpe(["ab"], vocab_size=1000).vocab_size < 270


def test_training_is_deterministic(bpe):
    program = (
        "import sys, json; from jaxfw.data import train_bpe;"
        "sys.stdout.buffer.write(train_bpe(json.load(sys.stdin), vocab_size=400).files['tokenizer.json'])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    again = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(TEXTS).encode(),
        capture_output=True,
        env=environment,
        check=True,
    )
    assert again.stdout == bpe.files["tokenizer.json"]


def test_special_tokens_are_one_token_each_and_left_out_of_text(bpe):
    ids = bpe.encode("a<|end_of_text|>b")
    assert bpe.eos_id in ids and bpe.decode(ids) == "ab"
    assert bpe.special_ids == {0, 1, 2}


def test_training_without_special_tokens():
    bare = train_bpe(TEXTS, vocab_size=300, special_tokens={}, chat_template=None)
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.chat_template) == (None, None, None, None)
    assert bare.encode("") == [] and bare.vocab_size == 300


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"vocab_size": 258}, ("vocab_size=258", "at least 259")),
        ({"vocab_size": 300, "special_tokens": {"begin": "<b>"}}, ("'begin'", "bos_token")),
    ],
)
def test_training_refuses(options, parts):
    with pytest.raises(InputError) as caught:
        train_bpe(TEXTS, **options)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(("text", "part"), [(b"bytes", "must be a str, not bytes"), ("a\ud800", "lone surrogates")])
def test_encode_refuses(bpe, text, part):
    with pytest.raises(InputError, match=part):
        bpe.encode(text)


# --- directories


def test_what_is_written_is_read_again(bpe, directory):
    read = load_tokenizer(directory)
    assert read.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    assert (read.vocab_size, read.bos_id, read.eos_id, read.pad_id) == (400, 0, 1, 2)
    assert read.chat_template == bpe.chat_template
    assert json.loads((directory / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_originals_are_kept_to_the_byte(directory, tmp_path):
    """Also those with other spacing, and files that only other programs read."""
    path = directory / "tokenizer_config.json"
    path.write_bytes(b'{"eos_token":   "<|end_of_text|>",\r\n "unknown_attribute": [1, 2]}')
    (directory / "added_tokens.json").write_bytes(b"{ }")
    (directory / "tokenizer.model").write_bytes(b"\x00\x01")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"tools\r\n")
    copy = save_tokenizer(tmp_path / "copy", load_tokenizer(directory))
    names = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    assert names == {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    assert all((copy / name).read_bytes() == (directory / name).read_bytes() for name in names)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("form", [lambda token: token, lambda token: {"content": token, "lstrip": False}])
def test_special_tokens_in_every_form(directory, where, form):
    (directory / "tokenizer_config.json").write_text("{}")
    named = {"bos_token": form("<|begin_of_text|>"), "eos_token": form("<|pad|>"), "pad_token": None}
    (directory / where).write_text(json.dumps(named | {"add_bos_token": True}))
    read = load_tokenizer(directory)
    assert (read.bos_id, read.eos_id, read.pad_id) == (0, 2, None)
    assert dict(read.special_tokens) == {"bos_token": "<|begin_of_text|>", "eos_token": "<|pad|>"}


def test_special_tokens_without_any_description(directory):
    (directory / "tokenizer_config.json").unlink()
    read = load_tokenizer(directory)
    assert (read.bos_id, read.eos_id) == (None, None)
    assert read.encode("a")[0] == 0  # tokenizer.json's post-processor decides


def test_tokens_that_only_the_config_names_are_added(directory):
    new = {"400": {"content": "<new>", "special": False}, "401": {"content": "<|pad|>", "special": True}}
    config = {"added_tokens_decoder": new, "pad_token": "<padding>", "extra_special_tokens": ["<x>"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    read = load_tokenizer(directory)
    assert read.encode("<new><padding><x>", add_special_tokens=False) == [400, 401, 402]
    assert (read.pad_id, read.vocab_size) == (401, 403)
    assert read.decode([400, 401, 402]) == "<new>"


def test_truncation_and_padding_of_the_file_are_off(directory):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(directory / "tokenizer.json"))
    read = load_tokenizer(directory)
    assert read.decode(read.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_the_post_processor_decides_about_the_first_token(tmp_path, add_bos_token):
    config = {"bos_token": "<s>", "add_bos_token": add_bos_token, "add_eos_token": True}
    assert tokens(load_tokenizer(write(tmp_path, sentencepiece_like(), **config)), "hello") == ["<s>", "▁hello"]


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({}, " a</s>b", ["<s>", "▁", "▁a", "</s>", "▁", "b"]),  # as tokenizer.json says
        ({"tokenizer_class": "LlamaTokenizer"}, " a</s>b", ["<s>", "▁a", "</s>", "b"]),
        ({"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, "a</s>b", ["<s>", "▁a", "</s>", "b"]),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, "a</s>b", ["<s>", "▁a", "</s>", "▁", "b"]),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, "a</s>b", ["<s>", "a", "</s>", "b"]),
    ],
)
def test_sentencepiece_spaces_follow_the_class(tmp_path, config, text, expected):
    """Expectations are transformers' own answers; the oracle tests ask it again."""
    read = load_tokenizer(write(tmp_path, sentencepiece_like(), **config))
    assert tokens(read, text) == expected
    assert read.bos_id == (1 if config else None)


def test_the_class_may_stand_in_the_models_config(tmp_path):
    write(tmp_path, sentencepiece_like())
    (tmp_path / "config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert tokens(load_tokenizer(tmp_path), " a") == ["<s>", "▁a"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", None, "AutoTokenizer"),
        ("tokenizer.json", "{", "damaged"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', "download it again"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, not list"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template must be"),
        ("special_tokens_map.json", "nope", "not valid JSON"),
    ],
)
def test_damaged_directories(directory, name, content, part):
    (directory / "chat_template.jinja").unlink()
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(directory)
    assert part in str(caught.value) and name in str(caught.value)


# --- streams


def pieces(tokenizer, ids, size, before=()):
    stream = TextStream(tokenizer, before)
    parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*parts, stream.finish()]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    return load_tokenizer(write(directory, sentencepiece_like(), tokenizer_class="LlamaTokenizer"))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_pieces_join_to_the_text(request, kind, data):
    """For ids as a random model draws them: mostly broken characters."""
    tokenizer = request.getfixturevalue(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    parts = pieces(tokenizer, ids, data.draw(st.integers(1, 5)))
    assert "".join(parts) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_no_piece_holds_half_a_character(request, kind):
    tokenizer, text = request.getfixturevalue(kind), "hello é€😀 hello 漢字 a"
    ids = tokenizer.encode(text)
    parts = pieces(tokenizer, ids, 1)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert len([part for part in parts if part]) > 3  # it does stream


def test_a_byte_token_that_spoils_its_run_spoils_nothing_sent(sentencepiece):
    ids = [sentencepiece.backend.token_to_id(token) for token in ("▁a", "<0xC3>", "<0xA9>", "<0xFF>", "b")]
    assert sentencepiece.decode(ids[:3]) == "aé" and sentencepiece.decode(ids) == "a\ufffd\ufffd\ufffdb"
    assert pieces(sentencepiece, ids, 1) == ["a", "", "", "", "\ufffd\ufffd\ufffdb", ""]


def test_a_continuation_keeps_its_first_space(sentencepiece):
    before, after = sentencepiece.encode("hello"), sentencepiece.encode("hello", add_special_tokens=False)
    assert "".join(pieces(sentencepiece, after, 1, before=before)) == " hello"
    assert "".join(pieces(sentencepiece, after, 1)) == "hello"


# --- chat templates


def test_the_default_template(bpe):
    text = bpe.render_chat([{"role": "system", "content": " Be brief. "}, *USER])
    assert text == (
        "<|begin_of_text|>### system\nBe brief.<|end_of_text|>\n### user\nHi <there> é<|end_of_text|>\n### assistant\n"
    )
    assert not bpe.render_chat(USER, add_generation_prompt=False).endswith("assistant\n")


def test_where_templates_come_from(directory):
    """A file of its own, then tokenizer_config.json, as a text or as a list; `tool_use` where there are tools."""
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "inline"}))
    (directory / "chat_template.jinja").write_text("of its own")
    assert load_tokenizer(directory).render_chat(USER) == "of its own"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert load_tokenizer(directory).render_chat(USER, tools=[{"name": "f"}]) == "tools"
    (directory / "additional_chat_templates" / "tool_use.jinja").unlink()
    (directory / "chat_template.jinja").unlink()
    assert load_tokenizer(directory).render_chat(USER) == "inline"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools[0].name }}"}]
    config.write_text(json.dumps({"chat_template": named}))
    read = load_tokenizer(directory)
    assert (read.render_chat(USER), read.render_chat(USER, tools=[{"name": "f"}])) == ("plain", "with f")
    config.write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(InputError, match=r"no chat template is named 'default'; there are: tool_use"):
        load_tokenizer(directory).render_chat(USER)
    config.write_text("{}")
    with pytest.raises(InputError, match=r"no chat template.*chat_template\.jinja"):
        load_tokenizer(directory).render_chat(USER)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <there> é"}'),
        ("{{ {'b': 1, 'a': '<'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "<",\n "b": 1\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':'), ensure_ascii=true) }}", "[1,2]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks, lstrip_blocks
        ("{{ nothing }}{{ pad_token }}|{{ bos_token }}", "|<s>"),
        ("{% if tools is none and documents is none and not add_generation_prompt %}ok{% endif %}", "ok"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "1"),
    ],
)
def test_what_templates_rely_on(template, expected):
    assert chat.render(template, USER, special_tokens={"bos_token": "<s>"}) == expected


def test_keys_that_are_none_are_absent():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": None}}]}
    template = "{{ 'content' in messages[0] }} {{ messages[0].tool_calls[0].arguments | tojson }}"
    assert chat.render(template, [call]) == 'False {"x": null}'


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ messages.append({'role': 'system', 'content': 'obey'}) }}",
        "{{ messages[0].update({'content': 'changed'}) }}",
        "{{ messages[0].pop('content') }}",
        "{{ range(1000000) | list }}",
    ],
)
def test_a_template_that_oversteps_is_stopped(template):
    messages = [dict(USER[0])]
    with pytest.raises(InputError, match=r"chat template 'mischief'.*chat_template\.jinja"):
        chat.render(template, messages, name="mischief")
    assert messages == USER


@pytest.mark.parametrize(
    "template", ["{{ messages | attr('__class__') }}", "{{ messages | map(attribute='__class__') | first }}"]
)
def test_a_filter_does_not_reach_further_than_a_dot(template):
    assert chat.render(template, USER) == ""


def test_a_template_sees_a_copy():
    """Even where the sandbox lets a template change something, it is not the caller's."""
    messages = [dict(USER[0])]
    chat.render("{% set _ = dict.update(messages[0], {'content': 'changed'}) %}", messages)
    assert messages == USER


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (
            "{{ raise_exception('Roles must alternate') }}",
            ("cannot render", "Roles must alternate", "Change the messages"),
        ),
        ("a\n{% if %}", ("not valid Jinja", "line 2", "chat_template.jinja")),
        ("{{ messages[0].nothing.more }}", ("cannot render", "no attribute 'nothing'")),
        ("{{ 1 + 'a' }}", ("cannot render", "TypeError")),
        ("{% for m in 5 %}{% endfor %}", ("cannot render", "not iterable")),
        ("{{ ''.__class__.__mro__ }}", ("was stopped", "__class__", "do not trust")),
    ],
)
def test_errors_name_the_template_and_the_remedy(template, parts):
    with pytest.raises(InputError) as caught:
        chat.render(template, USER, name="of mine")
    assert all(part in str(caught.value) for part in ("'of mine'", *parts))


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ([], "messages is empty"),
        ("hello", "messages='hello' must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        (["hello"], "messages[0]='hello' must be a mapping"),
        ([*USER, {"content": "x"}], "messages[1]['role']=None"),
        ([{"role": 3, "content": "x"}], "messages[0]['role']=3"),
        ([{"role": "user"}], "messages[0]['content']=None"),
        ([{"role": "user", "content": 5}], "messages[0]['content']=5"),
        ([{"role": "user", "content": "x", "more": {1, 2}}], "messages[0] holds what JSON cannot"),
    ],
)
def test_malformed_messages(bpe, messages, part):
    with pytest.raises(InputError) as caught:
        bpe.render_chat(messages)
    assert part in str(caught.value)
