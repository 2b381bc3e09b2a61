"""A model with its tokenizer: text in, text out.

`LM` is a frozen object over pure functions: `config` and `params` go into `jaxfw.forward` and the others as they are,
and the methods only turn text into token ids and back. Axis letters: B rows, T tokens.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack, overload

import jax
import numpy as np
from jax.sharding import Mesh

from jaxfw import weights
from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Bool, Float, Int, PRNGKeyArray, PyTree
from jaxfw.data.chat import Message
from jaxfw.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from jaxfw.generate import engine
from jaxfw.generate.compression import CutsTexts, Spans, check_units, reading, with_policy
from jaxfw.generate.options import Answer, ModelValues, OnText, Options, check_texts, take_sampling
from jaxfw.generate.prefix import Prefix, read_prefix
from jaxfw.generate.prompts import check_whole
from jaxfw.generate.scoring import score_rows
from jaxfw.generate.stopping import RowText, check_stop
from jaxfw.generate.suggestions import (
    GENERATION,
    say_unfollowed,
    stop_ids_of,
    stop_strings_of,
    suggested_sampling,
)
from jaxfw.models import DecoderConfig
from jaxfw.models.cache import CachePolicy
from jaxfw.models.lora import adapt
from jaxfw.weights.shipped import located
from jaxfw.weights.tensors import read_json

Texts = TypeVar("Texts", str, list[str])


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """Configuration, parameters and tokenizer of a model, and what ends its texts: token ids, and strings.

    `attributes` and `generation` are config.json and generation_config.json as they were read, and are saved again.
    With a `mesh`, on which the parameters lie, the methods run there. Where it is of several processes, each calls the
    same methods with the same arguments and gets the same results.
    """

    config: DecoderConfig
    params: PyTree = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    stop_strings: tuple[str, ...] = ()
    mesh: Mesh | None = None

    def __post_init__(self):
        if self.tokenizer.vocab_size > self.config.vocab:
            raise InputError(
                f"the tokenizer has ids up to {self.tokenizer.vocab_size - 1}, the model's vocabulary holds "
                f"{self.config.vocab}: use the tokenizer that belongs to this model, or add rows to its embedding "
                "(and to its head) for the tokens that were added."
            )

    @property
    def suggested(self) -> dict[str, Any]:
        """How the model's generation_config.json says to draw, to pass on: `m.generate(prompt, **m.suggested)`.

        Of temperature, top_k, top_p, min_p and repetition_penalty those that change something; {} if it names none.
        """
        return suggested_sampling(self.generation)

    @overload
    def generate(
        self, prompts: Texts, *, units: Sequence[Spans] | None = None, **options: Unpack[Options]
    ) -> Texts: ...
    @overload
    def generate(
        self,
        prompts: str | list[str],
        *,
        n: int | None = None,
        units: Sequence[Spans] | None = None,
        details: bool = False,
        **options: Unpack[Options],
    ) -> Any: ...
    def generate(
        self,
        prompts: str | list[str],
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        key: PRNGKeyArray | None = None,
        n: int | None = None,
        stop: str | Sequence[str] = (),
        prefix: Prefix | None = None,
        protocol: str = "full",
        units: Sequence[Spans] | None = None,
        details: bool = False,
        on_text: OnText | None = None,
        **values: Unpack[ModelValues],
    ) -> Any:
        """Continue a text, or each of a list, up to a stop token or stop string (which is not part of the result).

        Args:
            prompts: a text or a list of texts, of any lengths.
            max_new_tokens: at most this many; prompt and new tokens must fit the model's context.
            temperature: draw at random, sharper below 1; None or 0 takes the likeliest token each time.
            top_k: draw from the k likeliest only.
            top_p: draw from the fewest tokens that hold this much probability.
            min_p: draw from tokens with at least this fraction of the likeliest one's probability.
            repetition_penalty: above 1 makes tokens of prompt and output less likely, greedy decoding included.
            key: the random key; None is `jax.random.key(0)`. Row b depends on the key and b, not on the other rows.
            n: samples of each prompt, which is read once: the result holds a list of n for each, and `on_text` calls
                sample j of prompt b row b * n + j. The first is what is drawn without `n`.
            stop: a text, or several, before which the result ends; those of the model (`stop_strings`) hold as well.
            prefix: what all prompts go on from, as `prefix` gives it.
            protocol: what the first new token sees of a cache that forgets: "full", "refeed" or "ctx", see
                `jaxfw.generate.compression`.
            units: of each prompt the pieces that stay or go together, as spans [begin, end) of characters; what stands
                behind the last of them is the question. None leaves it to the policy.
            details: return `Answer`s, with tokens, their log-probabilities and why they ended.
            on_text: called as `on_text(row, piece)` while the text grows. A row's pieces join to its result.
            values: kv, policy, room, router, router_states, experts, taps: see `ModelValues`.
        """
        texts = check_texts([prompts] if isinstance(prompts, str) else prompts, "prompts")
        ids = [self._encode(text, prefix) for text in texts]
        before = [row or (prefix.tokens if prefix else ()) for row in ids]
        given = with_policy(values, self.config.layers)
        if prefix and units is not None:
            raise InputError("units= and prefix= are given: what is read behind a prefix is not cut, give one of both.")
        unit_ids = None if prefix else self._unit_ids(texts, given["policy"], units)
        out = self._continue(
            ids, before, n=n, details=details, protocol=protocol, unit_ids=unit_ids,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, key=key, stop=stop, prefix=prefix, on_text=on_text, **given,
        )  # fmt: skip
        return out[0] if isinstance(prompts, str) else out

    def generate_from(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        unit_ids: Sequence[Sequence[int]] | None = None,
        **options: Unpack[Options],
    ) -> list[str]:
        """As `generate`, from rows of token ids that are taken as they are; `unit_ids` are those of their units."""
        rows = [list(row) for row in tokens]
        given = with_policy(options, self.config.layers)
        return self._continue(rows, rows, n=None, details=False, unit_ids=unit_ids, **given)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        n: int | None = None,
        details: bool = False,
        **options: Unpack[Options],
    ) -> Any:
        """The assistant's next words in a conversation: a str; for a list of conversations, a list of them.

        `messages` is `[{"role": "user", "content": "..."}, ...]`, rendered by the model's chat template; `tools` are
        JSON schemas of functions that the model may call, for templates that read them. A `prefix` is the rendered
        beginning of every conversation, which is given whole all the same. The rest is as in `generate`.
        """
        is_many = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if is_many else [messages]
        texts = [self.tokenizer.render_chat(conversation, tools=tools) for conversation in conversations]
        prefix = options.get("prefix")
        ids = [self._rest(self.tokenizer.encode(text, add_special_tokens=False), prefix) for text in texts]
        given = with_policy(options, self.config.layers)
        units = None if prefix else self._unit_ids(texts, given["policy"], None, add_special_tokens=False)
        out = self._continue(ids, [()] * len(ids), n=n, details=details, unit_ids=units, **given)
        return out if is_many else out[0]

    def prefix(
        self,
        beginning: str | Sequence[Message],
        *,
        key: PRNGKeyArray | None = None,
        protocol: str = "full",
        units: Spans | None = None,
        **values: Unpack[ModelValues],
    ) -> Prefix:
        """Read once what many prompts begin with: `m.generate(questions, prefix=m.prefix(document))`.

        A prompt is encoded together with the prefix's text, so that results are those of the joined texts; where a
        token would reach across the border, the prompt is encoded by itself (let prompts begin with a space or a line).

        Args:
            beginning: a text; or messages, for `chat`.
            key: for policies that draw what they keep.
            protocol: "refeed" lets what comes first behind the prefix see no more than what comes later ("full").
            units: the pieces of the text that stay or go together, as in `generate`.
            values: as in `generate`; a cache that keeps a part does so of the beginning alone. `room` is for prefix,
                prompt and new tokens together: None leaves 512 or more behind the prefix. Routers and taps are to be
                given again to what goes on from it.
        """
        is_text = isinstance(beginning, str)
        text = beginning if is_text else self.tokenizer.render_chat(beginning, add_generation_prompt=False)
        ids = self.tokenizer.encode(text, add_special_tokens=is_text)
        if not ids:
            raise InputError("the prefix is empty: give at least one character.")
        if protocol not in ("full", "refeed"):
            raise InputError(f"protocol={protocol!r} must be full or refeed: a prefix is a context by itself.")
        given = with_policy(values, self.config.layers)
        cut = None if units is None else [units]
        unit_ids = self._unit_ids([text], given["policy"], cut, add_special_tokens=is_text)
        with self._on_mesh():
            return read_prefix(
                self.config, self.params, ids, key=key, text=text, refeed=protocol == "refeed",
                unit_ids=None if unit_ids is None else unit_ids[0], **given,
            )  # fmt: skip

    def _unit_ids(
        self,
        texts: Sequence[str],
        policy: CachePolicy | None,
        units: Sequence[Spans] | None,
        *,
        add_special_tokens: bool = True,
    ) -> list[list[int]] | None:
        """The unit of each token, by the spans that were given or that the policy finds; None if there are none."""
        if units is None:
            if not isinstance(policy, CutsTexts):
                return None
            units = [policy.spans(text) for text in texts]
        check_units(texts, units)
        return [
            self.tokenizer.unit_ids(text, spans, add_special_tokens=add_special_tokens)
            for text, spans in zip(texts, units, strict=True)
        ]

    def _encode(self, text: str, prefix: Prefix | None) -> list[int]:
        if not isinstance(prefix, Prefix | None):
            raise InputError(f"prefix={prefix!r:.60} must be what m.prefix(text) returns: it is read once there.")
        if prefix is None:
            return self.tokenizer.encode(text)
        size, joined = len(prefix.tokens), self.tokenizer.encode(prefix.text + text)
        fits = tuple(joined[:size]) == prefix.tokens
        return joined[size:] if fits else self.tokenizer.encode(text, add_special_tokens=False)

    def _rest(self, ids: list[int], prefix: Prefix | None) -> list[int]:
        if prefix is None:
            return ids
        if tuple(ids[: len(prefix.tokens)]) != prefix.tokens:
            raise InputError(
                "the conversation does not begin with the prefix: give it whole, from the first message on."
            )
        return ids[len(prefix.tokens) :]

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _continue(
        self,
        prompts: list[list[int]],
        before: Sequence[Sequence[int]],
        *,
        n: int | None,
        details: bool,
        stop: str | Sequence[str] = (),
        max_new_tokens: int = 128,
        on_text: OnText | None = None,
        protocol: str = "full",
        unit_ids: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> list[Any]:
        """A str or `Answer` for each prompt, or a list of `n`; `before` are the ids that precede each row's text."""
        strings = tuple(dict.fromkeys((*self.stop_strings, *check_stop(stop))))
        sampling = take_sampling(options)
        if options.get("prefix") and protocol != "full":
            raise InputError(f"protocol={protocol!r} beside a prefix, which was read before: leave out protocol=.")
        options |= reading(protocol, unit_ids)
        each = 1 if n is None else check_whole("n", n)
        rows = [RowText(self.tokenizer, row, self.stop_ids, strings) for row in before for _ in range(each)]

        def tell(row: int, piece: str) -> None:
            if piece and on_text:
                on_text(row, piece)

        def take(chunk: Int[np.ndarray, "B n"]) -> Bool[np.ndarray, "B"]:
            for i, ids in enumerate(chunk.tolist()):
                tell(i, rows[i].push(ids))
            return np.array([row.is_done for row in rows])

        with self._on_mesh():
            out = engine.generate(
                self.config, self.params, prompts, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids,
                sampling=sampling, n=each, logprobs=details, on_tokens=take, **options,
            )  # fmt: skip
        for i, row in enumerate(rows):
            tell(i, row.finish())
        results = [_answer(row, out, i) for i, row in enumerate(rows)] if details else [row.text for row in rows]
        return results if n is None else [results[i : i + n] for i in range(0, len(results), n)]

    @overload
    def logprobs(self, texts: str, *, prefix: Prefix | None = None) -> Float[np.ndarray, "n"]: ...
    @overload
    def logprobs(self, texts: list[str], *, prefix: Prefix | None = None) -> list[Float[np.ndarray, "n"]]: ...
    def logprobs(self, texts: str | list[str], *, prefix: Prefix | None = None) -> Any:
        """Log-probability of each token given those before it, natural logarithm, float32; one array a text.

        The first token has nothing before it and no entry: entry t belongs to token t + 1 of `tokenizer.encode(text)`.
        With a tokenizer that begins texts with a special token, that one is the first, and every token of the text
        has its entry. Behind a `prefix` every token has one, as the answers of a multiple choice have. Rows are padded
        to a few sizes, so that texts of all lengths share a few compiled programs.
        """
        given = check_texts([texts] if isinstance(texts, str) else texts, "texts")
        rows = [self._encode(text, prefix) for text in given]
        before = len(prefix.tokens) if prefix else 0
        for i, row in enumerate(rows):
            if not given[i] or not row:
                raise InputError(f"texts[{i}] is empty: give at least one character.")
            if before + len(row) > self.config.context:
                raise InputError(
                    f"texts[{i}] has {before + len(row)} tokens, more than the model's {self.config.context} "
                    "positions: score it in pieces."
                )
        if prefix:
            prefix.check(self.config, self.params)
            prefix.check_room(max(map(len, rows)), 0)
        with self._on_mesh():
            out = score_rows(self.config, self.params, rows, prefix=prefix)
        return out[0] if isinstance(texts, str) else out

    def save(self, directory: str | Path) -> Path:
        """Write a Hugging Face directory that `load` and transformers read; it appears complete or not at all.

        Raises:
            InputError: the directory exists and is not empty.
        """
        ids = {
            "bos_token_id": self.tokenizer.bos_id,
            "eos_token_id": self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids) or None,
            "pad_token_id": self.tokenizer.pad_id,
        }
        generation = {**ids, **self.generation, "eos_token_id": ids["eos_token_id"]}
        generation = {name: value for name, value in generation.items() if value is not None}
        if self.stop_strings:
            generation["stop_strings"] = list(self.stop_strings)
        extra = {**self.tokenizer.files, GENERATION: (json.dumps(generation, indent=2) + "\n").encode()}
        return weights.save(
            directory, self.config, self.params, attributes={**ids, **self.attributes}, extra=extra,
            model_type=self.attributes.get("model_type"),
        )  # fmt: skip


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
    quantise: str | None = None,
    adapter: str | Path | None = None,
) -> LM:
    """A Hugging Face model directory as an `LM`; the keywords are those of `jaxfw.weights.load`, and an `adapter`.

    `load("embedded-1")` is the small model that comes with jaxfw, with abilities that can be measured.

    An `adapter` is a directory that PEFT, or a training run, wrote for this model. It is kept beside the model's
    matrices, which may be quantised; `python -m jaxfw.weights export` merges the two instead.

    Texts end with `eos_token_id` of generation_config.json, else of config.json, else the tokenizer's; and before its
    `stop_strings`, which hold in every call as the ids do. How that file says to draw is left to the caller
    (`LM.suggested`), and what else it asks for and is not done here (beams, n-gram bans) is told once.

    Raises:
        InputError: whatever is missing, damaged or not understood, by file and name.
    """
    if not isinstance(mesh, Mesh | None):
        raise InputError(f"mesh={mesh!r:.60} must be a mesh: jaxfw.core.mesh.make_mesh(tensor=2), say.")
    directory = located(directory)
    if (directory / "model" / "config.json").is_file():
        raise InputError(f"{directory} is the workdir of a run: its model is in {directory / 'model'}.")
    if directory.is_dir() and not (directory / TOKENIZER).is_file():
        raise InputError(
            f"{directory} holds no {TOKENIZER}, so there is no text to read or write: take it from the model's "
            "repository. Without one the pure functions still work on token ids: jaxfw.weights.load(DIR) gives config "
            "and parameters for jaxfw.forward and jaxfw.generate_tokens."
        )
    checkpoint = weights.load(
        directory, mesh=mesh, param_dtype=param_dtype, dtype=dtype, softmax_dtype=softmax_dtype, quantise=quantise
    )
    params = checkpoint.params
    if adapter is not None:
        model_type = checkpoint.attributes.get("model_type")
        params = adapt(params, *weights.load_adapters(adapter, checkpoint.config, mesh=mesh, model_type=model_type))
    tokenizer = load_tokenizer(directory)
    path = directory / GENERATION
    generation = read_json(path) if path.is_file() else {}
    say_unfollowed(directory, generation)
    stop_ids = stop_ids_of({GENERATION: generation, "config.json": checkpoint.attributes}, tokenizer)
    return LM(
        checkpoint.config, params, tokenizer, stop_ids, checkpoint.attributes, generation,
        stop_strings_of(generation), mesh,
    )  # fmt: skip


def _answer(row: RowText, out: engine.Generation, i: int) -> Answer:
    assert out.logprobs is not None
    return Answer(
        row.text, tuple(row.tokens), out.logprobs[i][: len(row.tokens)], "stop" if row.is_done else "length",
        out.prefill_seconds, out.decode_seconds,
    )  # fmt: skip
