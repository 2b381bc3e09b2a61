"""A model with its tokenizer: text in, text out.

`LM` is a frozen object over pure functions: `config` and `params` go into `jaxfw.forward` and the others as they are,
and the methods only turn text into token ids and back. Axis letters: B rows, T tokens.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxfw import weights
from jaxfw.core.errors import InputError
from jaxfw.core.log import say_once
from jaxfw.core.shapes import Array, Float, Int, PRNGKeyArray, PyTree
from jaxfw.data.chat import Message
from jaxfw.data.tokenizer import TOKENIZER, TextStream, Tokenizer, load_tokenizer
from jaxfw.generate import engine
from jaxfw.models import DecoderConfig, Edit, embed, first_step, head, trunk
from jaxfw.models.cache import CachePolicy
from jaxfw.models.routing import Experts, Router
from jaxfw.ops.losses import token_log_probs
from jaxfw.ops.sampling import Sampling
from jaxfw.weights.tensors import read_json

GENERATION = "generation_config.json"
# A call scores at most this many rows and padded tokens. The logits of fewer tokens are alive at once: with a large
# vocabulary they are the largest arrays by far.
SCORED_ROWS, SCORED_TOKENS, LOGIT_TOKENS = 8, 4096, 1024

Texts = TypeVar("Texts", str, list[str])
OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """Configuration, parameters and tokenizer of a model, and the token ids that end its texts.

    `attributes` and `generation` are config.json and generation_config.json as they were read, and are saved again.
    """

    config: DecoderConfig
    params: PyTree = dataclasses.field(repr=False)
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.tokenizer.vocab_size > self.config.vocab:
            raise InputError(
                f"the tokenizer has ids up to {self.tokenizer.vocab_size - 1}, the model's vocabulary holds "
                f"{self.config.vocab}: use the tokenizer that belongs to this model, or add rows to its embedding "
                "(and to its head) for the tokens that were added."
            )

    def generate(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        key: PRNGKeyArray | None = None,
        room: int | None = None,
        policy: CachePolicy | None = None,
        router: Router | None = None,
        router_states: PyTree | None = None,
        experts: Experts | None = None,
        taps: Sequence[Edit] = (),
        on_text: OnText | None = None,
    ) -> Texts:
        """Continue a text, or each of a list, up to a stop token (which is not part of the result).

        Args:
            prompts: a text or a list of texts, of any lengths.
            max_new_tokens: at most this many; prompt and new tokens must fit the model's context.
            temperature: draw at random, sharper below 1; None or 0 takes the likeliest token each time.
            top_k: draw from the k likeliest only.
            top_p: draw from the fewest tokens that hold this much probability.
            min_p: draw from tokens with at least this fraction of the likeliest one's probability.
            key: the random key; None is `jax.random.key(0)`. Row b depends on the key and b, not on the other rows.
            room: slots of the cache. Calls with one batch size and one `room` share a compiled decode loop, whatever
                their prompts; None takes what the longest prompt's bucket and `max_new_tokens` need.
            policy: what the cache keeps (`jaxfw.models.cache`); None keeps everything.
            router: who decides which experts a token goes to; None is the config's.
            router_states: what a router with a bias remembers of training.
            experts: who runs a mixture's experts (`jaxfw.models.routing`); None is `Sorted()`.
            taps: edits of what passes inside of the model (`jaxfw.models.taps`).
            on_text: called as `on_text(row, piece)` while the text grows. A row's pieces join to its result.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenizer.encode(text) for text in _texts(texts, "prompts")]
        streams = [TextStream(self.tokenizer, before=row) for row in ids]
        sampling = _sampling(temperature, top_k, top_p, min_p)
        values = {"policy": policy, "router": router, "experts": experts, "router_states": router_states, "taps": taps}
        out: Any = self._continue(ids, streams, max_new_tokens, sampling, key, room, on_text, **values)
        return out[0] if isinstance(prompts, str) else out

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        key: PRNGKeyArray | None = None,
        room: int | None = None,
        policy: CachePolicy | None = None,
        router: Router | None = None,
        router_states: PyTree | None = None,
        experts: Experts | None = None,
        taps: Sequence[Edit] = (),
        on_text: OnText | None = None,
    ) -> Any:
        """The assistant's next words in a conversation: a str; for a list of conversations, a list of them.

        `messages` is `[{"role": "user", "content": "..."}, ...]`, rendered by the model's chat template; `tools` are
        JSON schemas of functions that the model may call, for templates that read them. The rest is as in `generate`.
        """
        is_many = isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations: Any = messages if is_many else [messages]
        texts = [self.tokenizer.render_chat(conversation, tools=tools) for conversation in conversations]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        streams = [TextStream(self.tokenizer) for _ in ids]
        sampling = _sampling(temperature, top_k, top_p, min_p)
        values = {"policy": policy, "router": router, "experts": experts, "router_states": router_states, "taps": taps}
        out = self._continue(ids, streams, max_new_tokens, sampling, key, room, on_text, **values)
        return out if is_many else out[0]

    def _continue(self, prompts, streams, max_new_tokens, sampling, key, room, on_text, **values) -> list[str]:
        texts = ["" for _ in prompts]

        def emit(row: int, piece: str) -> None:
            texts[row] += piece
            if piece and on_text:
                on_text(row, piece)

        def take(chunk: Int[np.ndarray, "B n"]) -> None:
            for row, ids in enumerate(chunk.tolist()):
                emit(row, streams[row].push(id_ for id_ in ids if id_ >= 0 and id_ not in self.stop_ids))
                if not set(ids).isdisjoint(self.stop_ids):
                    emit(row, streams[row].finish())

        engine.generate(
            self.config, self.params, prompts, max_new_tokens=max_new_tokens, stop_ids=self.stop_ids,
            sampling=sampling, key=key, room=room, on_tokens=take, **values,
        )  # fmt: skip
        for row, stream in enumerate(streams):
            emit(row, stream.finish())
        return texts

    @overload
    def logprobs(self, texts: str) -> Float[np.ndarray, "n"]: ...
    @overload
    def logprobs(self, texts: list[str]) -> list[Float[np.ndarray, "n"]]: ...
    def logprobs(self, texts: str | list[str]) -> Any:
        """Log-probability of each token given those before it, natural logarithm, float32; one array a text.

        The first token has nothing before it and no entry: entry t belongs to token t + 1 of `tokenizer.encode(text)`.
        With a tokenizer that begins texts with a special token, that one is the first, and every token of the text
        has its entry. Rows are padded to a few sizes, so that texts of all lengths share a few compiled programs.
        """
        given = _texts([texts] if isinstance(texts, str) else texts, "texts")
        rows = [self.tokenizer.encode(text) for text in given]
        for i, row in enumerate(rows):
            if not given[i] or not row:
                raise InputError(f"texts[{i}] is empty: give at least one character.")
            if len(row) > self.config.context:
                raise InputError(
                    f"texts[{i}] has {len(row)} tokens, more than the model's {self.config.context} positions: "
                    "score it in pieces."
                )
        out: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of like lengths share a call
        while order:
            count = max(1, min(SCORED_ROWS, SCORED_TOKENS // engine.bucket(len(rows[order[0]]))))
            chosen, order = order[:count], order[count:]
            for i, scores in zip(chosen, self._score([rows[i] for i in chosen]), strict=True):
                out[i] = scores
        return out[0] if isinstance(texts, str) else out

    def _score(self, rows: list[list[int]]) -> list[Float[np.ndarray, "n"]]:
        B = 1 << (len(rows) - 1).bit_length()
        tokens = np.zeros((B, engine.bucket(max(map(len, rows)))), np.int32)
        lengths = np.ones(B, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], lengths[i] = row, len(row)
        scores = np.asarray(logprobs(self.config, self.params, jnp.asarray(tokens), lengths=jnp.asarray(lengths)))
        return [scores[i, : len(row) - 1].copy() for i, row in enumerate(rows)]

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
        extra = {**self.tokenizer.files, GENERATION: (json.dumps(generation, indent=2) + "\n").encode()}
        attributes = {**ids, **self.attributes}
        return weights.save(directory, self.config, self.params, attributes=attributes, extra=extra)


def load(
    directory: str | Path,
    *,
    param_dtype: str | None = None,
    dtype: str | None = None,
    softmax_dtype: str = "float32",
) -> LM:
    """A Hugging Face model directory as an `LM`; the keywords are those of `jaxfw.weights.load`.

    Texts end with `eos_token_id` of generation_config.json, else of config.json, else the tokenizer's.

    Raises:
        InputError: whatever is missing, damaged or not understood, by file and name.
    """
    directory = Path(directory)
    if (directory / "model" / "config.json").is_file():
        raise InputError(f"{directory} is the workdir of a run: its model is in {directory / 'model'}.")
    if directory.is_dir() and not (directory / TOKENIZER).is_file():
        raise InputError(
            f"{directory} holds no {TOKENIZER}, so there is no text to read or write: take it from the model's "
            "repository. Without one the pure functions still work on token ids: jaxfw.weights.load(DIR) gives config "
            "and parameters for jaxfw.forward and jaxfw.generate_tokens."
        )
    checkpoint = weights.load(directory, param_dtype=param_dtype, dtype=dtype, softmax_dtype=softmax_dtype)
    tokenizer = load_tokenizer(directory)
    path = directory / GENERATION
    generation = read_json(path) if path.is_file() else {}
    _say_defaults(directory, generation)
    stop_ids = _stop_ids({GENERATION: generation, "config.json": checkpoint.attributes}, tokenizer)
    return LM(checkpoint.config, checkpoint.params, tokenizer, stop_ids, checkpoint.attributes, generation)


@partial(jax.jit, static_argnames="config")
def logprobs(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "B T"], *, lengths: Int[Array, "B"]
) -> Float[Array, "B T-1"]:
    """Log-probability of each token from the second on, given those before it, float32.

    Entries from a row's length on mean nothing. The logits of a block of tokens at a time are alive, never all.
    """
    B, T = tokens.shape
    x = trunk(config, params, embed(config, params, tokens), first_step(lengths, T)).x
    block = min(T, max(1, LOGIT_TOKENS // B))
    blocks = -(-T // block)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, blocks * block - T + 1))).reshape(B, blocks, block)
    x = jnp.pad(x, ((0, 0), (0, blocks * block - T), (0, 0))).reshape(B, blocks, block, -1)

    def score(part):
        return token_log_probs(head(config, params, part[0]), part[1])

    scores = jax.lax.map(score, (jnp.swapaxes(x, 0, 1), jnp.swapaxes(targets, 0, 1)))
    return jnp.swapaxes(scores, 0, 1).reshape(B, -1)[:, : T - 1]


def _say_defaults(directory: Path, generation: Mapping[str, Any]) -> None:
    """What the file suggests is the user's to take: the same call gives the same text with every model."""
    names = ("temperature", "top_k", "top_p", "min_p")
    suggested = ", ".join(f"{name}={generation[name]}" for name in names if generation.get(name) is not None)
    if generation.get("do_sample") and suggested:
        say_once(f"{directory / GENERATION} suggests {suggested}; generate() is greedy unless you pass them.")


def _sampling(temperature: float | None, *filters: Any) -> Sampling:
    return Sampling(None if temperature == 0 else temperature, *filters)


def _texts(texts: Any, name: str) -> list[str]:
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name}={texts!r:.80} must be a str or a list of str.")
    if not texts:
        raise InputError(f"{name} is an empty list: give at least one text.")
    return list(texts)


def _stop_ids(sources: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`eos_token_id` of the first file that has one, a number or a list; else the tokenizer's."""
    for file, source in sources.items():
        found = source.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(id_) is int for id_ in ids):
            raise InputError(f"{file}: eos_token_id={found!r} must be a token id or a list of them.")
        if ids:
            return tuple(ids)
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)
