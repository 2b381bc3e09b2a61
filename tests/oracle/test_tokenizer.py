"""The same directory in transformers' AutoTokenizer and here: the same ids, texts, special tokens and conversations."""

import json

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors, trainers

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from jaxfw.data import load_tokenizer, save_tokenizer, train_bpe  # noqa: E402
from jaxfw.generate import LM  # noqa: E402
from jaxfw.models import DecoderConfig, init  # noqa: E402

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again; hello world.",
    "def hello(name):\n    return f'hello {name}'\n",
    "12345 67 8 é€ naïve façade",
] * 3
TEXTS = [
    "hello world", " hello", "  two  spaces ", "hello</s>world", "a</s> b", "<s>hello", "é€😀 naïve", "", "</s>", "▁x",
    "\n\ttabs\r\n", "12345", "<|eot_id|>hello<|eot_id|> x", "<new>a<extra>", "A sentence .  Another , one 's .",
]  # fmt: skip
SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "unk_token": None}
LLAMA_CLASS = SENTENCEPIECE | {"tokenizer_class": "LlamaTokenizer"}
NEW = {"content": "<new>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False, "special": False}


def llama2():
    """SentencePiece-like: spaces in the normaliser, bytes as tokens."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=pieces, show_progress=False))
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token | {"normalized": False} for token in described["added_tokens"][:3]]
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend


def llama3():
    """Byte-level, as LLaMA 3."""
    return train_bpe(CORPUS, vocab_size=420, special_tokens={k: v for k, v in LLAMA3.items() if v}).backend


def write(directory, backend, tokenizer_config, **files):
    """A model directory: tokenizer.json, config.json, and what else is given."""
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    for name, value in {"config": {"model_type": "llama"}, "tokenizer_config": tokenizer_config, **files}.items():
        if value is not None:
            (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def both(directory):
    return load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)


def assert_equal(ours, theirs):
    for text in TEXTS:
        for add in (True, False):
            ids = theirs.encode(text, add_special_tokens=add)
            assert ours.encode(text, add_special_tokens=add) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= set(theirs.all_special_ids)


CASES = {
    "llama2, nothing said": (llama2, None, {}),
    "llama2, no class": (llama2, SENTENCEPIECE, {}),
    "llama2, fast class": (llama2, SENTENCEPIECE | {"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "llama2, LlamaTokenizer": (llama2, LLAMA_CLASS, {}),
    "llama2, LlamaTokenizerFast": (llama2, SENTENCEPIECE | {"tokenizer_class": "LlamaTokenizerFast"}, {}),
    "llama2, legacy": (llama2, LLAMA_CLASS | {"legacy": True}, {}),
    "llama2, not legacy": (llama2, LLAMA_CLASS | {"legacy": False}, {}),
    "llama2, legacy null": (llama2, LLAMA_CLASS | {"legacy": None}, {}),
    "llama2, no prefix space": (llama2, LLAMA_CLASS | {"add_prefix_space": False}, {}),
    "llama2, no bos asked for": (llama2, LLAMA_CLASS | {"add_bos_token": False, "add_eos_token": True}, {}),
    "llama2, class alone": (llama2, {"tokenizer_class": "LlamaTokenizer"}, {}),
    "llama2, class in config.json": (
        llama2, SENTENCEPIECE, {"config": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}},
    ),
    "llama2, pad token added": (llama2, LLAMA_CLASS | {"pad_token": "<pad>"}, {}),
    "llama2, tokens as objects": (
        llama2,
        {name: {"content": token, "__type": "AddedToken"} for name, token in SENTENCEPIECE.items()},
        {},
    ),
    "llama2, special_tokens_map": (
        llama2, {}, {"special_tokens_map": {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}},
    ),
    "llama2, map beside numbered tokens": (
        llama2, SENTENCEPIECE | {"added_tokens_decoder": {}}, {"special_tokens_map": {"eos_token": "<s>"}},
    ),
    "llama3": (llama3, LLAMA3 | {"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "llama3, said to be LlamaTokenizer": (llama3, LLAMA3 | {"tokenizer_class": "LlamaTokenizer"}, {}),
    "llama3, no bos asked for": (llama3, LLAMA3 | {"add_bos_token": False}, {}),
    "llama3, clean-up asked for": (llama3, LLAMA3 | {"clean_up_tokenization_spaces": True}, {}),
    "llama3, special tokens split": (llama3, LLAMA3 | {"split_special_tokens": True}, {}),
    "llama3, more tokens": (
        llama3,
        LLAMA3 | {"added_tokens_decoder": {"420": NEW}, "additional_special_tokens": ["<extra>"], "pad_token": "<pad>"},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_encodes_and_decodes_alike(tmp_path, name):
    make, config, files = CASES[name]
    assert_equal(*both(write(tmp_path / "model", make(), config, **files)))


@pytest.mark.parametrize("name", ["llama2, LlamaTokenizer", "llama3, more tokens"])
def test_what_we_save_again_is_the_same_to_them(tmp_path, name):
    make, config, files = CASES[name]
    read = load_tokenizer(write(tmp_path / "model", make(), config, **files))
    assert_equal(*both(save_tokenizer(tmp_path / "copy", read)))


def test_what_they_save_is_the_same_to_us(tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path / "model", llama3(), LLAMA3))
    theirs.chat_template = TEMPLATES["chatml"]
    theirs.save_pretrained(tmp_path / "saved")
    ours = load_tokenizer(tmp_path / "saved")
    assert_equal(ours, theirs)
    assert ours.chat_template == theirs.chat_template


def test_what_we_train_is_the_same_to_them(tmp_path):
    trained = train_bpe(CORPUS, vocab_size=400)
    directory = save_tokenizer(tmp_path / "trained", trained)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = both(directory)
    assert_equal(ours, theirs)
    assert_equal(trained, theirs)
    expected = theirs.apply_chat_template(CONVERSATIONS["plain"], tokenize=False, add_generation_prompt=True)
    assert trained.render_chat(CONVERSATIONS["plain"]) == expected


# --- conversations

# In the shapes that are in use: LLaMA 2, LLaMA 3, ChatML, tool calls, and what else templates do.
TEMPLATES = {
    "inst": """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "headers": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = '26 Jul 2024' %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + date_string }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "chatml": """\
{% for message in messages %}
  {{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "tools": """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is string %}{{ '\\n' + message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{% set call = call.function %}{% endif %}
        {{- '\\n<tool_call>\\n' + ({'name': call.name, 'arguments': call.arguments} | tojson(indent=2)) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' ~ ns.last }}{% endif %}""",
    "generation, macros, loop control": """\
{%- macro show(m) %}[{{ m.role | upper }}:{{ m.content | tojson }}]{% endmacro %}
{% for message in messages %}{% if loop.index > 3 %}{% break %}{% endif %}
{% if message.role == 'assistant' %}{% generation %}{{ show(message) }}{{ eos_token }}{% endgeneration %}
{% else %}{{ show(message) }}{% endif %}{% endfor %}
{{ documents is none }}{{ pad_token }}{{ strftime_now('%Y') }}""",
}

CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "<b>é</b>", "limit": None}}}
CONVERSATIONS = {
    "plain": [{"role": "user", "content": " Who <are> you? "}],
    "longer": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What's 1 & 1?"},
        {"role": "assistant", "content": '2 "two"\n'},
        {"role": "user", "content": "Thänks 😀"},
    ],
}
FUNCTION = {"name": "search", "description": "Finds <é> & 'more'.", "parameters": {"a": [1, None, 2.5]}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALLS = [
    {"role": "user", "content": "Search."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "[]", "name": "search"},
]


@pytest.mark.parametrize("place", ["file", "config", "list"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_alike(tmp_path, name, place):
    directory = write(tmp_path / "model", llama3(), LLAMA3 | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if place == "file":
        (directory / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
        config = {"chat_template": "not this one"}
    else:
        named = [{"name": "default", "template": TEMPLATES[name]}, {"name": "tool_use", "template": TEMPLATES["tools"]}]
        config = {"chat_template": named if place == "list" else TEMPLATES[name]}
    (directory / "tokenizer_config.json").write_text(json.dumps(LLAMA3 | config))
    ours, theirs = both(directory)
    cases = [(messages, tools) for messages in CONVERSATIONS.values() for tools in (None, TOOLS)]
    if name == "tools":
        cases.append((CALLS, TOOLS))
    for messages, tools in cases:
        for add in (True, False):
            text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=add)
            assert ours.render_chat(messages, tools=tools, add_generation_prompt=add) == text
            ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=add, return_dict=False)
            assert ours.encode(text, add_special_tokens=False) == ids


def test_a_conversation_that_a_template_refuses_is_refused_by_both(tmp_path):
    directory = write(tmp_path / "model", llama3(), LLAMA3 | {"chat_template": TEMPLATES["inst"]})
    ours, theirs = both(directory)
    messages = [{"role": "assistant", "content": "I begin."}]
    with pytest.raises(Exception, match="must alternate"):
        theirs.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ValueError, match=r"chat template 'default' cannot render.*must alternate"):
        ours.render_chat(messages)


def test_a_saved_model_answers_alike(tmp_path):
    """A whole `LM` directory: transformers takes its tokenizer, weights and stop tokens from it."""
    torch = pytest.importorskip("torch")
    config = DecoderConfig(
        vocab=400, width=32, ffn=64, layers=1, heads=4, kv_heads=2, head_dim=8, positions=64, init_std=0.4
    )
    trained = train_bpe(CORPUS, vocab_size=400)
    model = LM(config, jax.jit(init, static_argnums=0)(config, jax.random.key(0)), trained, (trained.eos_id, 7))
    directory = model.save(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.generation_config.eos_token_id == [trained.eos_id, 7]
    assert theirs.generation_config.pad_token_id == trained.pad_id
    prompt = tokenizer("hello world", return_tensors="pt")
    with torch.no_grad():
        ids = theirs.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == 16 and model.generate("hello world", max_new_tokens=16) == text
