"""Our models in EleutherAI's lm-evaluation-harness: public tasks, the requests of its `hf` backend. Needs `eval`.

    python -m jaxfw.evals.harness run --model jaxfw --model_args pretrained=DIR --tasks arc_easy,gsm8k

    from jaxfw.evals.harness import HarnessLM
    lm_eval.simple_evaluate(model=HarnessLM(jaxfw.load(DIR)), tasks=["arc_easy"])

Requests are cut into tokens as `hf` does it, with one difference: of a prompt to be continued that is too long, the
beginning-of-text token stays. Rows of like length share a call, and are padded to a few sizes.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from lm_eval import utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("jaxfw.evals.harness needs lm-eval: pip install 'jaxfw[eval]'.") from error

from jaxfw.core.errors import InputError, unknown
from jaxfw.core.mesh import constrain
from jaxfw.core.shapes import Array, Bool, Float, Int, PyTree
from jaxfw.evals.compressed import score_texts
from jaxfw.generate.compression import CutsTexts, reading, with_policy
from jaxfw.generate.lm import LM, load
from jaxfw.generate.prompts import pack
from jaxfw.models import DecoderConfig, embed, first_step, head, trunk
from jaxfw.models.cache import Cache, CachePolicy, FullCache, Step
from jaxfw.ops.losses import token_log_probs

LOGIT_TOKENS = 1024  # whose logits are alive at once
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
Row = tuple[list[int], int]  # tokens, of which the last so many are scored


@dataclasses.dataclass(frozen=True)
class _Generation:
    """How a request wants to be continued."""

    until: tuple[str, ...]
    new_tokens: int
    sampling: tuple[tuple[str, float], ...]


class HarnessLM(TemplateLM):
    """A model with its tokenizer as the harness asks for it.

    Args:
        pretrained: a Hugging Face model directory, or what `jaxfw.load` gave.
        batch_size: rows that are scored or continued together.
        max_gen_toks: new tokens where a task does not say how many.
        quantise: "int8" or "int4".
        dtype: of the arithmetic; None is as stored.
        kv: how the cache is compressed, as in "snapkv@keep=0.3" (`jaxfw.kv`; semicolons for commas). Then every text is
            scored through the cache of its context, never by a single forward.
        protocol: what the first token behind a prompt sees of it, see `jaxfw.generate.compression`.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | LM,
        *,
        batch_size: int | str = 16,
        max_gen_toks: int = 256,
        quantise: str | None = None,
        dtype: str | None = None,
        kv: str | None = None,
        protocol: str = "full",
        **more: Any,
    ):
        super().__init__()
        # What the harness hands to every model, and means nothing here.
        stray = sorted(set(more) - {"device", "max_batch_size"})
        if stray:
            known = ("batch_size", "dtype", "kv", "max_gen_toks", "pretrained", "protocol", "quantise")
            raise unknown("--model_args", stray[0], known)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size={batch_size!r} must be a whole number from 1 on.")
        self.lm = pretrained if isinstance(pretrained, LM) else load(pretrained, quantise=quantise, dtype=dtype)
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        self.max_length = self.lm.config.context
        self.kv, self.protocol = kv, protocol
        self.policy = with_policy({"kv": kv}, self.lm.config.layers)["policy"]
        reading("full" if self.policy is None and protocol == "ctx" else protocol, [])

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.lm.tokenizer.eos_id
        return found if found is not None else next(iter(self.lm.stop_ids), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        found = self.lm.tokenizer.bos_id
        return self.eot_token_id if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of cached requests."""
        return f"jaxfw-{self.lm.attributes.get('model_type', 'model')}-{self.lm.tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the beginning-of-text token gets no second one."""
        if add_special_tokens is None:
            bos = self.lm.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self.lm.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt, its last message is left open."""
        messages: Any = chat_history
        text = self.lm.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template by its text, for the harness's records."""
        return (self.lm.tokenizer.chat_template or "") if chat_template else ""

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [((context + text)[-(self.max_length + 1) :], len(text)) for _, context, text in requests]
        if self.policy is None:
            found = self._score(rows)
        else:
            texts = [request[0][0] if request[0] else "" for request in requests]
            found = self._score_compressed(rows, texts, self.policy)
        for request, result in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once, in windows of the context's length that do not overlap.

        Raises:
            InputError: the cache is to be compressed, and there is no context to compress.
        """
        if self.policy is not None:
            raise InputError(f"kv={self.kv!r} compresses what stands before a text, and rolling log-likelihoods have "
                             "nothing there: run such tasks without kv=.")  # fmt: skip
        rows: list[Row] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (string,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(string), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for window in windows:
                context, text = utils.make_disjoint_window(window)
                rows.append(((context + text)[-(self.max_length + 1) :], len(text)))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [total for total, _ in self._score(rows)])
        return sums.tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string; greedy unless a task asks for sampling."""
        wanted = [self._generation(request.args[1]) for request in requests]
        ids = [self._prompt(request.args[0], want.new_tokens) for request, want in zip(requests, wanted, strict=True)]
        outputs = [""] * len(requests)
        for want in dict.fromkeys(wanted):
            order = sorted((i for i in range(len(ids)) if wanted[i] == want), key=lambda i: -len(ids[i]))
            for begin in range(0, len(order), self.batch_size):
                here = order[begin : begin + self.batch_size]
                options: Any = dict(want.sampling)
                if self.policy is not None:
                    texts = [requests[i].args[0] for i in here]
                    units = [self._units(text, ids[i]) for text, i in zip(texts, here, strict=True)]
                    options |= {"policy": self.policy, "protocol": self.protocol, "unit_ids": units}
                made = self.lm.generate_from(
                    [ids[i] for i in here], max_new_tokens=want.new_tokens, stop=want.until, **options
                )
                for i, text in zip(here, made, strict=True):
                    outputs[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return outputs

    def _generation(self, options: dict[str, Any]) -> _Generation:
        given = options.get("until") or []
        until: list[str] = [given] if isinstance(given, str) else given
        sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not options.get("do_sample", bool(sampling.get("temperature"))):
            sampling = {}
        return _Generation(
            tuple(text for text in until if text), int(options.get("max_gen_toks", self.max_gen_toks)),
            tuple(sorted(sampling.items())),
        )  # fmt: skip

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        room = self.max_length - new_tokens
        if room < 2:
            raise InputError(f"max_gen_toks={new_tokens} leaves no room for a prompt in {self.max_length} positions.")
        ids = self.tok_encode(text)
        if len(ids) <= room:
            return ids
        begins = ids[:1] if ids[0] == self.lm.tokenizer.bos_id else []
        return begins + ids[len(ids) - room + len(begins) :]

    def _units(self, text: str, ids: Sequence[int]) -> list[int]:
        """The unit of each token: the blocks of a few-shot prompt, which may have been cut at its beginning."""
        assert isinstance(self.policy, CutsTexts)
        bos = self.lm.tokenizer.special_tokens.get("bos_token")
        special = not (bos and text.startswith(bos))
        found = self.lm.tokenizer.unit_ids(text, self.policy.spans(text), add_special_tokens=special)
        found = [-1] * max(0, len(ids) - len(found)) + found[max(0, len(found) - len(ids)) :]
        first = min((unit for unit in found if unit >= 0), default=0)
        return [unit - first if unit >= 0 else -1 for unit in found]

    def _score_compressed(self, rows: list[Row], texts: Sequence[str], policy: CachePolicy) -> list[tuple[float, bool]]:
        """Each context is read once, whatever follows it."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (tokens, count) in enumerate(rows):
            groups.setdefault(tuple(tokens[:-count]), []).append(i)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(groups, key=lambda context: (-len(groups[context]), -len(context)))
        for begin in range(0, len(order), self.batch_size):
            here = order[begin : begin + self.batch_size]
            behind = [[rows[i][0][len(context) :] for i in groups[context]] for context in here]
            units = [self._units(texts[groups[context][0]], context) for context in here]
            with self._on_mesh():
                out = score_texts(
                    self.lm.config, self.lm.params, here, behind, policy=policy, protocol=self.protocol,
                    unit_ids=units,
                )  # fmt: skip
            for place, context in enumerate(here):
                for m, i in enumerate(groups[context]):
                    found[i] = _total(out, (place, m), slice(rows[i][1]))
        return found

    def _score(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """Of each row's last tokens the summed log-probability, and whether each is the likeliest.

        What several rows begin with, as the answers of a multiple choice do, is read once.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (tokens, count) in enumerate(rows):
            groups.setdefault(tuple(tokens[:-count]), []).append(i)
        alone: list[int] = []
        shared: list[tuple[int, ...]] = []
        for context, members in groups.items():
            if len(members) > 1 and len(context) >= max(rows[i][1] for i in members):
                shared.append(context)
            else:
                alone += members
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        alone.sort(key=lambda i: -len(rows[i][0]))
        for begin in range(0, len(alone), self.batch_size):
            here = alone[begin : begin + self.batch_size]
            for i, result in zip(here, self._score_alone([rows[i] for i in here]), strict=True):
                found[i] = result
        shared.sort(key=lambda context: (-len(groups[context]), -len(context)))
        for begin in range(0, len(shared), self.batch_size):
            here = shared[begin : begin + self.batch_size]
            texts = [[rows[i][0][len(context) :] for i in groups[context]] for context in here]
            for context, results in zip(here, self._score_shared(here, texts), strict=True):
                for i, result in zip(groups[context], results, strict=True):
                    found[i] = result
        return found

    def _score_alone(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        fill = [[0, 0]] * (_power(len(rows)) - len(rows))
        given = [*(tokens for tokens, _ in rows), *fill]
        size = min(_quarter(max(map(len, given)) - 1), self.max_length)
        tokens, lengths = pack([row[:-1] for row in given], size)
        targets, _ = pack([row[1:] for row in given], size)
        with self._on_mesh():
            out = score_targets(self.lm.config, self.lm.params, tokens, targets, lengths=lengths)
        return [_total(out, i, slice(len(row) - 1 - count, len(row) - 1)) for i, (row, count) in enumerate(rows)]

    def _score_shared(
        self, contexts: Sequence[Sequence[int]], texts: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, bool]]]:
        B, K = _power(len(contexts)), _power(max(map(len, texts)))
        n = _power(max(len(text) for row in texts for text in row))
        size = min(_quarter(max(map(len, contexts))), self.max_length)
        tokens, lengths = pack([*contexts, *[(0,)] * (B - len(contexts))], size)
        targets = np.zeros((B, K, n), np.int32)
        for place, row in enumerate(texts):
            for k, text in enumerate(row):
                targets[place, k, : len(text)] = text
        with self._on_mesh():
            out = score_choices(self.lm.config, self.lm.params, tokens, targets, lengths=lengths)
        return [
            [_total(out, (place, k), slice(len(text))) for k, text in enumerate(row)] for place, row in enumerate(texts)
        ]

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.lm.mesh is None else jax.set_mesh(self.lm.mesh)


def _total(out: tuple[Any, Any], place: Any, inside: slice) -> tuple[float, bool]:
    """Of a row's scores and best flags those inside."""
    scores, best = (np.asarray(part)[place][inside] for part in out)
    return float(scores.sum(dtype=np.float64)), bool(best.all())


def _power(count: int) -> int:
    """The power of two from `count` on: sizes of batches, so that few programs are compiled."""
    return 1 << (count - 1).bit_length()


def _quarter(length: int) -> int:
    """The next of four sizes between powers of two: rows are padded by a tenth on average.

    >>> [_quarter(length) for length in (3, 70, 81, 128, 129)]
    [16, 80, 96, 128, 160]
    """
    step = max(_power(length) // 8, 4)
    return max(16, -(-length // step) * step)


register_model("jaxfw")(HarnessLM)


@functools.partial(jax.jit, static_argnames="config")
def score_targets(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    *,
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probability of the target behind each token, float32, and whether nothing is likelier.

    The logits of a block of tokens at a time are alive, never all.
    """
    B, T = tokens.shape
    x = trunk(config, params, embed(config, params, tokens), first_step(lengths, T)).x
    block = min(T, max(1, LOGIT_TOKENS // B))
    blocks = -(-T // block)
    x = jnp.pad(x, ((0, 0), (0, blocks * block - T), (0, 0))).reshape(B, blocks, block, -1)
    targets = jnp.pad(targets, ((0, 0), (0, blocks * block - T))).reshape(B, blocks, block)
    parts = (jnp.swapaxes(x, 0, 1), jnp.swapaxes(targets, 0, 1))
    found = jax.lax.map(lambda part: _scored(head(config, params, part[0]), part[1]), parts)
    scores, best = (jnp.swapaxes(part, 0, 1).reshape(B, -1)[:, :T] for part in found)
    return constrain(scores, None, None), constrain(best, None, None)


@functools.partial(jax.jit, static_argnames="config")
def score_choices(
    config: DecoderConfig,
    params: PyTree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B K n"],
    *,
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B K n"], Bool[Array, "B K n"]]:
    """As `score_targets`, of K texts of n tokens behind each row, which is read once; its cache is never copied."""
    B, K, n = targets.shape
    T, policy = tokens.shape[1], FullCache()
    step = dataclasses.replace(first_step(lengths, T), tokens=tokens)
    x, cache = _read(config, params, tokens, step, policy=policy, room=T + n)
    end = head(config, params, jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1))[:, 0]
    likely = jax.nn.log_softmax(end.astype(jnp.float32))
    first = (jnp.take_along_axis(likely, targets[..., 0], axis=1), jnp.argmax(end, axis=-1)[:, None] == targets[..., 0])
    first = tuple(part[..., None] for part in first)
    if n > 1:

        def score(text: Int[Array, "B n"]) -> tuple[Any, Any]:
            step = first_step(jnp.full(B, n - 1, jnp.int32), n - 1)
            step = dataclasses.replace(step, positions=step.positions + lengths[:, None], tokens=text[:, :-1])
            x, _ = _read(config, params, text[:, :-1], step, policy=policy, cache=cache, write=False)
            return _scored(head(config, params, x), text[:, 1:])

        rest = (jnp.swapaxes(part, 0, 1) for part in jax.lax.map(score, jnp.swapaxes(targets, 0, 1)))
        first = tuple(jnp.concatenate(parts, axis=-1) for parts in zip(first, rest, strict=True))
    scores, best = first
    return constrain(scores, None, None, None), constrain(best, None, None, None)


def _read(
    config: DecoderConfig, params: PyTree, tokens: Int[Array, "B T"], step: Step, **options: Any
) -> tuple[Float[Array, "B T D"], Cache | None]:
    x = embed(config, params, tokens, positions=step.positions)
    out = trunk(config, params, x, step, **options)
    return out.x, out.cache


def _scored(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> tuple[Any, Any]:
    return token_log_probs(logits, targets), jnp.argmax(logits, axis=-1) == targets


def main() -> None:
    """lm-eval's own command line, where `--model jaxfw` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
