"""Text to token ids and back: the `tokenizer.json` of a Hugging Face directory, and a byte-level BPE trained here.

What is read encodes as transformers 5 does. There, `tokenizer.json` decides (its post-processor says whether a
beginning-of-text token is added; `add_bos_token` in tokenizer_config.json is ignored), with two exceptions that are
followed here: tokens that only tokenizer_config.json names are added, and the class `LlamaTokenizer` replaces the
normaliser (see `_as_llama`).
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxfw.core.errors import InputError
from jaxfw.data import chat

TOKENIZER, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# What makes up a tokenizer on the Hub; the last three are read by other programs only, and travel along.
FILES = (TOKENIZER, CONFIG, SPECIAL, TEMPLATE, "added_tokens.json", "tokenizer.model", "vocab.json")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

SPECIAL_TOKENS = MappingProxyType(
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
)
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}### {{ message.role }}\n{{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}### assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its special tokens and chat templates, by name, and the files that describe it."""

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str] = dataclasses.field(repr=False)
    files: Mapping[str, bytes] = dataclasses.field(repr=False)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with what the tokenizer puts around it (a beginning-of-text token, say) by default."""
        if not isinstance(text, str):
            raise InputError(f"text={text!r} must be a str, not {type(text).__name__}.")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what the library says of a str that is not valid Unicode
            raise InputError(
                f"text={text!r:.80} holds lone surrogates, which are no characters: replace them."
            ) from None

    def unit_ids(self, text: str, spans: Sequence[tuple[int, int]], *, add_special_tokens: bool = True) -> list[int]:
        """The span of characters [begin, end) that each token of `encode(text)` is in, by its number; -1 for none.

        A token belongs to where its first character stands; what is put around the text belongs to no span.
        """
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        found = [-1] * len(encoding.ids)
        # Special tokens that were put around the text have no place in it, which the library writes as (0, 0).
        starts = [
            (i, begin)
            for i, ((begin, _), special) in enumerate(zip(encoding.offsets, encoding.special_tokens_mask, strict=True))
            if not special
        ]
        for number, (begin, end) in enumerate(spans):
            for i, at in starts:
                if begin <= at < end:
                    found[i] = number
        return found

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; U+FFFD stands for bytes that are no character."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[chat.Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """A conversation as text, by the chat template. Encode it with `add_special_tokens=False`: it has its own."""
        name, template = chat.choose(self.chat_templates, has_tools=tools is not None)
        return chat.render(
            template,
            messages,
            name=name,
            special_tokens=self.special_tokens,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id: the rows that an embedding needs."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token."""
        return self._id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The padding token."""
        return self._id("pad_token")

    @property
    def chat_template(self) -> str | None:
        """The default template's source."""
        return self.chat_templates.get("default")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


class TextStream:
    """Text from token ids as they come, cut only where no later token can change it.

    The pieces of `push`, and `finish` last, join to the text of all ids. A character is never split: bytes wait for
    the rest of theirs, and byte tokens of a SentencePiece vocabulary (`<0xE2>`) until one that is none, because their
    decoder judges a run of them as a whole. `before` are the ids that precede: a SentencePiece decoder drops the
    space at the start of a text, which is no start if something precedes.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._restart(list(before[-1:]))

    def push(self, ids: Iterable[int]) -> str:
        """Take further ids; the text that is now certain, often ''."""
        self._ids.extend(ids)
        settled = len(self._ids)
        while settled and self._is_open(self._ids[settled - 1]):
            settled -= 1
        text = self._tokenizer.decode(self._ids[:settled])
        # Bytes of an unfinished character decode to U+FFFD; so do bad ones, which can wait as well.
        certain = text.rstrip("\ufffd")
        piece = self._advance(certain)
        if settled and certain == text:
            self._restart(self._ids[settled - 1 :])
        return piece

    def finish(self) -> str:
        """What was held back."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _restart(self, ids: list[int]) -> None:
        """Go on from an id whose text is out, so that no call decodes everything again."""
        self._ids, self._sent = ids, len(self._tokenizer.decode(ids[:1]))

    def _advance(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent += len(piece)
        return piece

    def _is_open(self, id_: int) -> bool:
        token = self._tokenizer.backend.id_to_token(id_)
        return id_ in self._tokenizer.special_ids or bool(re.fullmatch(r"<0x[0-9A-F]{2}>", token or ""))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read tokenizer.json and the files beside it that name special tokens and chat templates.

    Raises:
        InputError: no tokenizer.json, or a damaged file.
    """
    directory = Path(directory)
    files = _read_files(directory)
    if TOKENIZER not in files:
        raise InputError(
            f"{directory} holds no {TOKENIZER}. Take it from the model's repository; where there is only a "
            "tokenizer.model, convert once: transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT)."
        )
    config, source = _json(directory, files, CONFIG), files[TOKENIZER]
    of_model = directory / "config.json"
    of_model = _json(directory, {of_model.name: of_model.read_bytes()}, of_model.name) if of_model.is_file() else {}
    class_name = str(config.get("tokenizer_class") or of_model.get("tokenizer_class") or "").removesuffix("Fast")
    special = {} if "added_tokens_decoder" in config else _json(directory, files, SPECIAL)
    named = {name: _content(special.get(name) or config.get(name)) for name in NAMED}
    if class_name == "LlamaTokenizer" and b'"ByteLevel"' not in source:
        source = json.dumps(_as_llama(_json(directory, files, TOKENIZER), config)).encode()
        for name, token in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items():
            named[name] = named[name] or token
    try:
        backend = tokenizers.Tokenizer.from_buffer(source)
    except Exception as error:  # the library raises plain Exceptions
        raise InputError(
            f"{directory / TOKENIZER} is damaged or not a tokenizer ({error}): download it again."
        ) from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    tokens = {name: token for name, token in named.items() if token is not None}
    backend.add_tokens(_added_tokens(config, special, tokens))
    return Tokenizer(backend, tokens, _templates(files, config), files)


def save_tokenizer(directory: str | Path, tokenizer: Tokenizer) -> Path:
    """Write the tokenizer's files into a directory (made if it is not there); those that were read, byte for byte."""
    directory = Path(directory)
    for name, content in tokenizer.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Mapping[str, str] = SPECIAL_TOKENS,
    chat_template: str | None = DEFAULT_TEMPLATE,
    single_digits: bool = False,
) -> Tokenizer:
    """Byte-level BPE from texts: any Unicode text comes back as it went in. The same texts give the same tokenizer.

    Args:
        texts: what to learn merges from.
        vocab_size: at most this many tokens, at least 256 and the special ones; few texts give fewer.
        special_tokens: by the name of their role; they get the first ids, and a `bos_token` is put before every text.
        chat_template: the default template; None for none.
        single_digits: each digit of a number is a token of its own.
    """
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise InputError(f"vocab_size={vocab_size} must be at least {least}: every byte and the special tokens.")
    for name in set(special_tokens) - set(NAMED):
        raise InputError(f"special_tokens: {name!r} is not one of {', '.join(NAMED)}.")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if single_digits else words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if bos := special_tokens.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    templates = {} if chat_template is None else {"default": chat_template}
    return Tokenizer(backend, dict(special_tokens), templates, _write_files(backend, special_tokens, chat_template))


def _write_files(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None
) -> dict[str, bytes]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files = {TOKENIZER: backend.to_str(pretty=True), CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    if chat_template is not None:
        files[TEMPLATE] = chat_template
    return {name: content.encode() for name, content in files.items()}


def _read_files(directory: Path) -> dict[str, bytes]:
    more = sorted(path.relative_to(directory).as_posix() for path in (directory / MORE_TEMPLATES).glob("*.jinja"))
    return {name: (directory / name).read_bytes() for name in (*FILES, *more) if (directory / name).is_file()}


def _json(directory: Path, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{directory / name} is not valid JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise InputError(f"{directory / name} must hold a JSON object, not {type(value).__name__}.")
    return value


def _content(token: Any) -> str | None:
    """A token is written as a string, or as {"content": ..., "lstrip": ...}."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _added_tokens(config: dict, special: dict, named: Mapping[str, str]) -> list[AddedToken]:
    """The tokens that the files beside tokenizer.json name; the backend passes over those that it has."""
    numbered = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = [*(more.values() if isinstance(more, dict) else more), *special.get("additional_special_tokens", [])]
    tokens = []
    for entry in [entry for _, entry in numbered] + list(named.values()) + more:
        flags = {name: value for name, value in entry.items() if name != "__type"} if isinstance(entry, dict) else {}
        is_special = not isinstance(entry, dict) or flags.pop("special", True) or _content(entry) in named.values()
        flags.pop("content", None)
        tokens.append(AddedToken(_content(entry) or "", special=is_special, **flags))
    return [token for token in tokens if token.content]


def _as_llama(described: dict, config: Mapping[str, Any]) -> dict:
    """A SentencePiece tokenizer.json as transformers 5's `LlamaTokenizer` takes it: vocabulary and merges only.

    The file's own normaliser puts a space before every stretch of text between special tokens, as `legacy` asks; the
    class does so at the start alone, and never before a space.
    """
    has_prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not has_prefix else "always" if config.get("legacy") is True else "first"
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = described.get("model", {})
    return {
        **described,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "vocab": model.get("vocab", {}),
            "merges": model.get("merges", []),
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source. Files of their own win over tokenizer_config.json."""
    found = {"default": files[TEMPLATE].decode()} if TEMPLATE in files else {}
    for name, content in files.items():
        if name.startswith(MORE_TEMPLATES):
            found[Path(name).stem] = content.decode()
    inline = config.get("chat_template")
    if found or inline is None:
        return found
    if isinstance(inline, str):
        return {"default": inline}
    try:
        return {entry["name"]: entry["template"] for entry in inline}
    except (TypeError, KeyError):
        raise InputError(
            f"{CONFIG}: chat_template must be a text or a list of {{'name': ..., 'template': ...}}, not {inline!r:.80}."
        ) from None
