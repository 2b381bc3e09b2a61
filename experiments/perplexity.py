"""Perplexity of a text file by a model directory: windows of the context length, each token scored once.

The text is one stream of tokens (with what the tokenizer puts in front of a text, once). A window reads `context`
tokens and predicts the `context` that follow each of them; it begins `stride` tokens behind the one before, and scores
those of its predictions that no earlier window has. So each token but the first is scored exactly once, and has at
least `context - stride + 1` tokens before it, or all there are. A smaller stride costs more and gives more context:
perplexities of the same model differ by it, and are compared at the same context and stride only.

Bits per byte, nats / ln 2 over the UTF-8 bytes of the text, compare models with different tokenizers. Where the
tokenizer puts nothing in front, the text's first token is not scored, though its bytes are counted.

The 95 % interval is over windows (a ratio of sums, by linearisation): neighbouring windows of one text are not
independent, so it says how much the text varies rather than what another text would give.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxfw
from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Float, Int
from jaxfw.generate import LM
from jaxfw.models.accounting import forward_flops, parameter_bytes, parameter_count
from jaxfw.report import Interval, Table, ratio_interval
from jaxfw.train import NextTokenLoss
from jaxfw.weights import load_config, model_sha256


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """The directory, the file and the windows; zeros and empty texts are defaults, see configs/perplexity.py."""

    experiment: str
    model: str
    file: str
    adapter: str
    dtype: str
    quantise: str
    context: int
    stride: int
    most_tokens: int
    batch: int
    chunk: int

    def __post_init__(self):
        for name, what in (("model", "a Hugging Face directory"), ("file", "a text file")):
            if not getattr(self, name):
                raise InputError(f"config.{name}='' is empty: name {what}, as in --config.{name}=PATH.")
        for name in ("context", "stride", "most_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"config.{name}={getattr(self, name)} must be at least 1, or 0 for the default.")
        for name in ("batch", "chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"config.{name}={getattr(self, name)} must be at least 1.")

    def window(self, positions: int) -> tuple[int, int]:
        """Context and stride for a model of so many positions.

        Raises:
            InputError: more context than positions; a stride beyond the context, which leaves tokens out.
        """
        context = self.context or positions
        stride = self.stride or max(context // 2, 1)
        if context > positions:
            raise InputError(f"config.context={context} exceeds the model's {positions} positions: lower it.")
        if stride > context:
            raise InputError(
                f"config.stride={stride} exceeds the context of {context} tokens: some would not be scored."
            )
        return context, stride


def windows(tokens: Int[np.ndarray, "N"], context: int, stride: int, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches for `NextTokenLoss`, of one shape: the last is filled up with rows that count nothing."""
    targets = len(tokens) - 1
    starts = [0, *range(stride, max(targets - context, 0) + stride, stride)]
    rows, weights = np.zeros((len(starts), context + 1), np.int32), np.zeros((len(starts), context + 1), np.float32)
    scored = 0
    for n, start in enumerate(starts):
        end = min(start + context, targets)
        rows[n, : end + 1 - start] = tokens[start : end + 1]
        weights[n, scored + 1 - start : end + 1 - start] = 1
        scored = end
    for n in range(0, len(starts), batch):
        fill = ((0, batch - len(rows[n : n + batch])), (0, 0))
        yield {"tokens": np.pad(rows[n : n + batch], fill), "weights": np.pad(weights[n : n + batch], fill)}


def score(
    lm: LM, tokens: Int[np.ndarray, "N"], *, context: int, stride: int, batch: int, chunk: int
) -> tuple[Float[np.ndarray, "W"], Float[np.ndarray, "W"]]:
    """Of each window, the negative log-likelihood in nats of what it scores, and how many tokens these are."""
    loss = NextTokenLoss(lm.config, chunk=chunk)
    run = jax.jit(partial(loss.rows, state={}))
    found = [jax.device_get(run(lm.params, part)) for part in windows(tokens, context, stride, batch)]
    nll, count = (np.concatenate([pair[i] for pair in found]).astype(np.float64) for i in (0, 1))
    return nll[count > 0], count[count > 0]


def describe(config: Any) -> dict[str, Any]:
    """What the model takes; no tensor is read."""
    c = to_dataclass(PerplexityConfig, config)
    model = load_config(c.model, param_dtype=c.dtype or None, dtype=c.dtype or None)
    context, stride = c.window(model.context)
    return {
        "parameters": parameter_count(model),
        "parameter bytes": parameter_bytes(model),
        "context": context,
        "stride": stride,
        "FLOPs of a window": forward_flops(model, batch=1, length=context),
    }


def run(config: Any, workdir: Path | None = None) -> dict[str, Any]:
    """Perplexity, nats a token and bits a byte of the file."""
    c = to_dataclass(PerplexityConfig, config)
    lm = jaxfw.load(
        c.model, param_dtype=c.dtype or None, dtype=c.dtype or None, quantise=c.quantise or None,
        adapter=c.adapter or None,
    )  # fmt: skip
    context, stride = c.window(lm.config.context)
    text = _read(c.file)
    tokens = np.asarray(lm.tokenizer.encode(text), np.int32)
    size = len(text.encode())
    if c.most_tokens and c.most_tokens < len(tokens):
        tokens = tokens[: c.most_tokens]
        size = len(lm.tokenizer.decode(tokens.tolist()).encode())
    if len(tokens) < 2:
        raise InputError(f"config.file={c.file!r} has {len(tokens)} token: there is nothing to predict.")
    nll, count = score(lm, tokens, context=context, stride=stride, batch=c.batch, chunk=c.chunk)
    nats = ratio_interval(nll, count)
    perplexity = Interval(*(math.exp(value) for value in (nats.value, nats.low, nats.high)))
    bits = float(nll.sum()) / math.log(2) / size
    print(f"perplexity {perplexity.value:.4g}, {nats.value:.4f} nats a token, {bits:.4f} bits a byte", flush=True)
    metrics = {
        "model_sha256": model_sha256(c.model),
        "perplexity": dataclasses.asdict(perplexity),
        "nats_per_token": dataclasses.asdict(nats),
        "bits_per_byte": bits,
        "tokens": int(count.sum()),
        "bytes": size,
        "windows": len(count),
        "context": context,
        "stride": stride,
    }
    return {"metrics": metrics, "checks": [], "report": _report(c, lm, perplexity, nats, metrics)}


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config.file={file!r} cannot be read ({error.strerror}): name a text file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"config.file={file!r} is no UTF-8 text, at byte {error.start}: convert it.") from None


def _report(
    c: PerplexityConfig, lm: LM, perplexity: Interval, nats: Interval, metrics: dict[str, Any]
) -> dict[str, Any]:
    return {
        "title": f"Perplexity of {Path(c.file).name} by {Path(c.model).name}",
        "summary": (
            f"Perplexity {perplexity.value:.4g} ({nats.value:.3f} nats a token, {metrics['bits_per_byte']:.3f} bits a "
            f"byte) over {metrics['tokens']:,} tokens; {parameter_count(lm.config) / 1e6:,.1f} M parameters, "
            f"{lm.config.dtype}{', ' + c.quantise if c.quantise else ''}."
        ),
        "sections": [
            Table(
                "Prediction",
                ("perplexity", "nats per token", "bits per byte", "tokens", "windows"),
                ((perplexity, nats, metrics["bits_per_byte"], metrics["tokens"], metrics["windows"]),),
                note=(
                    f"Windows of {metrics['context']} tokens, {metrics['stride']} apart: each token is scored once, "
                    f"with at least {metrics['context'] - metrics['stride'] + 1} before it or all there are. Intervals "
                    "are over windows."
                ),
            )
        ],
    }
