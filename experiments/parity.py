"""Parity with transformers, and the proof that a fault would show. Needs the `oracle` extra.

    python -m experiments.parity        # prints both tables, writes experiments/results/parity.json

Small models are made in transformers, saved by `save_pretrained` and read by `jaxfw.weights.load`. Tiny
models with default initialisation prove little: leaving RoPE scaling out altogether moves their logits by
6e-5. So these have sharp attention (query and key projections x6), random norm scales and biases, small
embeddings (so that the eps of norms counts), logits with a deviation of at least 1, and prompts of 4x the
context before stretching.

An error of logits is the largest absolute difference over valid tokens, divided by the standard deviation
of transformers' logits. An error of gradients is, of the worst parameter, the largest absolute difference
divided by the largest absolute gradient of that parameter. Rows are right-padded; of kind `dynamic`, whose
frequencies depend on a row's length, transformers runs each row alone. Each fault of `FAULTS` is planted
alone in our side.

Not planted, because it cannot show: positions that start at 1 (rotary embedding is relative).
"""

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxfw.core import runtime
from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, decoder, forward, llama, whole
from jaxfw.nn import layers
from jaxfw.ops import attention, rope
from jaxfw.ops.losses import token_log_probs
from jaxfw.weights import load

TOLERANCE = {"logits": 1e-5, "gradients": 1e-4}
VISIBLE = 100  # a planted fault must exceed the tolerance by this factor
RESULTS = Path(__file__).parent / "results" / "parity.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model in transformers' terms, and the lengths of the rows it is compared on."""

    name: str
    rope: dict[str, Any]
    heads: int
    kv_heads: int
    width: int
    head_dim: int = 16
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    positions: int = 256
    lengths: tuple[int, ...] = (144, 77, 9)


_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 6.0, "original_max_position_embeddings": 32,
         "beta_fast": 2.0, "beta_slow": 0.75}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32,
           "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}

CASES = {
    case.name: case
    for case in (
        Case("default", {"rope_type": "default", "rope_theta": 10000.0}, 4, 4, 64),
        Case("default, biased", {"rope_type": "default", "rope_theta": 500.0}, 8, 2, 64, tied=True,
             **_BIASED),
        Case("linear", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 6, 2, 48,
             attention_bias=True),
        Case("dynamic", _DYNAMIC, 8, 2, 64, tied=True, positions=32),
        Case("dynamic, biased", _DYNAMIC, 14, 2, 56, positions=32, **_BIASED),
        Case("yarn", _YARN, 14, 2, 56, mlp_bias=True),
        Case("yarn, attention_factor", {**_YARN, "attention_factor": 0.8}, 6, 2, 48, tied=True),
        Case("yarn, mscale", {**_YARN, "mscale": 2.0, "mscale_all_dim": 0.5}, 4, 4, 64, **_BIASED),
        Case("yarn, no truncate", {**_YARN, "truncate": False}, 8, 2, 64),
        Case("llama3", _LLAMA3, 8, 2, 64, tied=True),
        Case("llama3, biased", _LLAMA3, 7, 1, 56, **_BIASED),
        Case("llama3, long", {**_LLAMA3, "original_max_position_embeddings": 128}, 14, 2, 56, head_dim=8,
             positions=1024, lengths=(600, 523)),
    )
}  # fmt: skip


@dataclasses.dataclass
class Oracle:
    """The same model on both sides, and what transformers says about `tokens`."""

    case: Case
    model: Any
    config: DecoderConfig
    params: Any
    tokens: np.ndarray
    logits: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Valid tokens of each row."""
        return np.asarray(self.case.lengths, np.int32)

    @property
    def valid(self) -> np.ndarray:
        """Which tokens of `tokens` are not padding."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]

    @property
    def deviation(self) -> float:
        """The standard deviation of transformers' logits over valid tokens."""
        return float(self.logits[self.valid].std())


def _libraries() -> tuple[Any, Any]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"Parity needs {error.name}: pip install -e '.[oracle]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def make_model(case: Case, *, vocab: int = 96, seed: int = 0) -> Any:
    """A float32 transformers model whose every parameter matters to the logits."""
    torch, transformers = _libraries()
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=case.width, intermediate_size=2 * case.width + 8, num_hidden_layers=2,
        num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, head_dim=case.head_dim,
        max_position_embeddings=case.positions, rope_parameters=dict(case.rope), rms_norm_eps=1e-6,
        tie_word_embeddings=case.tied, attention_bias=case.attention_bias, mlp_bias=case.mlp_bias,
        attn_implementation="eager", pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng([seed, *case.name.encode()])
    for name, tensor in model.named_parameters():
        drawn = rng.standard_normal(tuple(tensor.shape))
        if name.endswith("norm.weight"):
            # A tied head is as small as the embedding: the last norm makes up for it.
            is_small = case.tied and name == "model.norm.weight"
            value = rng.uniform(0.5, 1.5, drawn.shape) * (8 if is_small else 1)
        elif name.endswith("bias"):
            value = 0.2 * drawn
        elif "embed_tokens" in name:
            value = 0.02 * drawn
        elif "lm_head" in name:
            value = 0.16 * drawn
        else:
            value = 0.025 * drawn * (6 if re.search(r"[qk]_proj", name) else 1)
        tensor.data.copy_(torch.from_numpy(value.astype(np.float32)))
    return model


def build(case: Case) -> Oracle:
    """The model of a case through `save_pretrained` and `jaxfw.weights.load`, and transformers' logits."""
    model = make_model(case)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        checkpoint = load(directory)
    shape = (len(case.lengths), max(case.lengths))
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, shape, np.int32)
    oracle = Oracle(case, model, checkpoint.config, checkpoint.params, tokens, np.empty(()))
    oracle.logits = _reference_logits(oracle).detach().numpy()
    return oracle


def _reference_logits(oracle: Oracle) -> Any:
    torch, _ = _libraries()
    tokens, model = torch.from_numpy(oracle.tokens).long(), oracle.model
    if oracle.case.rope["rope_type"] != "dynamic":
        return model(input_ids=tokens, attention_mask=torch.from_numpy(oracle.valid).long()).logits
    rows = []
    for row, length in zip(tokens, oracle.case.lengths):
        # It keeps the frequencies of the longest row it has met: start each row afresh.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        logits = model(input_ids=row[None, :length]).logits[0]
        rows.append(torch.nn.functional.pad(logits, (0, 0, 0, tokens.shape[1] - length)))
    return torch.stack(rows)


def _reference_gradients(oracle: Oracle) -> dict[str, np.ndarray]:
    torch, _ = _libraries()
    oracle.model.zero_grad()
    log_probs = torch.log_softmax(_reference_logits(oracle)[:, :-1], dim=-1)
    targets = torch.from_numpy(oracle.tokens[:, 1:]).long()[..., None]
    chosen = torch.gather(log_probs, -1, targets)[..., 0]
    (-chosen[torch.from_numpy(oracle.valid[:, 1:])].mean()).backward()
    return {name: tensor.grad.numpy() for name, tensor in oracle.model.named_parameters()}


def _our_logits(config: DecoderConfig, params: Any, oracle: Oracle) -> np.ndarray:
    # A new function for every call: what was traced before a fault was planted is not used again.
    def logits(params, tokens, lengths):
        return forward(config, params, tokens, lengths=lengths).logits

    return np.asarray(jax.jit(logits)(params, oracle.tokens, oracle.lengths), np.float32)


def _our_gradients(config: DecoderConfig, params: Any, oracle: Oracle) -> dict[str, np.ndarray]:
    """By transformers' names and in its layout."""
    tokens, lengths, counted = (jnp.asarray(x) for x in (oracle.tokens, oracle.lengths, oracle.valid[:, 1:]))

    def loss(params):
        logits = forward(config, params, tokens, lengths=lengths).logits
        return -jnp.sum(token_log_probs(logits[:, :-1], tokens[:, 1:]) * counted) / counted.sum()

    flat: dict[str, Any] = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    return {
        name: np.asarray(flat[path].T if path.endswith("/kernel") else flat[path])
        for path, name in llama.tensor_names(config).items()
    }


# --- faults: each changes one thing in our side


@dataclasses.dataclass(frozen=True)
class Fault:
    """One planted fault: an edit of the config, of the parameters, or a function of jaxfw replaced.

    `patch` is an owner, the name of its function, and what makes the faulty function from the real one.
    """

    name: str
    case: str
    config: Callable[[DecoderConfig], DecoderConfig] = lambda config: config
    params: Callable[[Any], Any] = lambda params: params
    patch: tuple[Any, str, Callable[[Any], Any]] | None = None
    shows_in: str = "logits"

    def planted(self) -> Any:
        """A context in which the fault is there."""
        if self.patch is None:
            return nullcontext()
        owner, attribute, spoil = self.patch
        return mock.patch.object(owner, attribute, spoil(getattr(owner, attribute)))


def _rope(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return lambda config: dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


def _config(**changes: Any) -> Callable[[DecoderConfig], DecoderConfig]:
    return lambda config: dataclasses.replace(config, **changes)


def _params(pattern: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def edit(params):
        flat = flatten_dict(params, sep="/")
        named = [path for path in flat if re.fullmatch(pattern, path)]
        assert named, f"no parameter is named {pattern}"
        return unflatten_dict({**flat, **{path: change(flat[path]) for path in named}}, sep="/")

    return edit


def _swap(one: str, other: str) -> Callable[[Any], Any]:
    def edit(params):
        flat = flatten_dict(params, sep="/")
        mark = {one: other, other: one}
        pattern = re.compile(f"{re.escape(one)}|{re.escape(other)}")
        return unflatten_dict({pattern.sub(lambda m: mark[m[0]], k): v for k, v in flat.items()}, sep="/")

    return edit


def _scale(factor: Callable[[DecoderConfig], float]) -> tuple[Any, str, Callable[[Any], Any]]:
    def spoil(real):
        return lambda config: dataclasses.replace(real(config), scale=factor(config))

    return decoder, "attention_spec", spoil


def _wrong_grouping(real):
    def attend(q, k, v, **options):
        order = np.argsort(np.arange(q.shape[2]) % k.shape[1], kind="stable")
        return real(q[:, :, order], k, v, **options)[:, :, np.argsort(order)]

    return attend


def _queries_one_later(real):
    def rotate(x, cos, sin):  # keys have fewer heads in the case that this is planted in
        is_query = x.shape[2] == CASES["default, biased"].heads
        return real(x, *(jnp.roll(t, -1, axis=1) if is_query else t for t in (cos, sin)))

    return rotate


def _interleaved(real):
    def rotate(x, cos, sin):
        pairs = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
        turned = real(pairs, cos, sin)
        return turned.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)

    return rotate


def _hard_switch(real):
    def frequencies(r, plain):
        return np.where(2 * np.pi / plain > r.original_positions / r.low_freq_factor, plain / r.factor, plain)

    return frequencies


def _longest_row(real):
    return lambda r, positions, *, width, seq_len: real(
        r, positions, width=width, seq_len=jnp.full_like(seq_len, seq_len.max())
    )


def _mask_shifted(by: int) -> tuple[Any, str, Callable[[Any], Any]]:
    def spoil(real):
        return lambda q, k, v, positions, *rest: real(q, k, v, positions + by, *rest)

    return attention, "_attend_block", spoil


def _norm(wrong: Callable[..., Any]) -> tuple[Any, str, Callable[[Any], Any]]:
    return layers, "rms_norm", lambda real: wrong


def _detached_statistics(x, scale, *, eps):
    return x * jax.lax.stop_gradient(jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)) * scale


_unscaled_frequencies = _rope(kind="default")
_B = "default, biased"
FAULTS = (
    Fault("rotation left out", "default", patch=(decoder, "rotate", lambda real: lambda x, cos, sin: x)),
    Fault("rotation interleaved, not half-split", "default", patch=(decoder, "rotate", _interleaved)),
    Fault("rotation the other way", "default",
          patch=(decoder, "rotate", lambda real: lambda x, cos, sin: real(x, cos, -sin))),
    Fault("positions of queries one too high", _B, patch=(decoder, "rotate", _queries_one_later)),
    Fault("theta 1 % too high", "default", config=_rope(theta=10100.0)),
    Fault("theta at its default", _B, config=_rope(theta=10000.0)),
    Fault("linear ignored", "linear", config=_unscaled_frequencies),
    Fault("dynamic ignored", "dynamic", config=_unscaled_frequencies),
    Fault("dynamic by the longest row's length", "dynamic", patch=(decoder, "rotation", _longest_row)),
    Fault("yarn ignored", "yarn", config=_unscaled_frequencies),
    Fault("yarn: default attention factor dropped", "yarn", config=_rope(attention_factor=1.0)),
    Fault("yarn: given attention_factor dropped", "yarn, attention_factor",
          config=_rope(attention_factor=None)),
    Fault("yarn: mscale ignored", "yarn, mscale", config=_rope(mscale=None)),
    Fault("yarn: truncate=false ignored", "yarn, no truncate", config=_rope(truncate=True)),
    Fault("yarn: beta_fast at its default", "yarn", config=_rope(beta_fast=32.0)),
    Fault("yarn: beta_slow at its default", "yarn", config=_rope(beta_slow=1.0)),
    Fault("llama3 ignored", "llama3", config=_unscaled_frequencies),
    Fault("llama3: hard switch for the smooth band", "llama3", patch=(rope, "_llama3", _hard_switch)),
    Fault("llama3: original positions doubled", "llama3", config=_rope(original_positions=64)),
    Fault("norm eps 1e-5 for 1e-6", "default", config=_config(norm_eps=1e-5)),
    Fault("norm skipped, scale kept", "default", patch=_norm(lambda x, scale, *, eps: x * scale)),
    Fault("norm subtracts the mean", "default",
          patch=(layers, "rms_norm", lambda real: lambda x, scale, *, eps: real(
              x - x.mean(axis=-1, keepdims=True), scale, eps=eps))),
    Fault("norm scale dropped: attention", "default", params=_params(r"\w+/attn_norm/scale", jnp.ones_like)),
    Fault("norm scale dropped: feed-forward", "default",
          params=_params(r"\w+/mlp_norm/scale", jnp.ones_like)),
    Fault("norm scale dropped: last", "default", params=_params("head/norm/scale", jnp.ones_like)),
    Fault("norms of a layer swapped", "default", params=_swap("attn_norm", "mlp_norm")),
    *(Fault(f"bias dropped: {name}", _B, params=_params(rf"\w+/{part}/{name}/bias", jnp.zeros_like))
      for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for name in names),
    Fault("attention scale 1/d", "default", patch=_scale(lambda c: 1 / c.head_dim)),
    Fault("attention scale 1/sqrt(D)", "default", patch=_scale(lambda c: c.width**-0.5)),
    Fault("query head h reads key head h % K", "yarn", patch=(decoder, "attend", _wrong_grouping)),
    Fault("causal mask sees the next token", "default", patch=_mask_shifted(1)),
    Fault("causal mask hides the token itself", "default", patch=_mask_shifted(-1)),
    Fault("o projection not transposed", "default", params=_params(r"\w+/attn/o/kernel", jnp.transpose)),
    Fault("gate and up swapped", "default", params=_swap("gate", "up")),
    Fault("gelu for silu", "default", patch=(layers.nn, "silu", lambda real: jax.nn.gelu)),
    Fault("layers in reverse", "default", params=_swap("layers_0", "layers_1")),
    Fault("untied head read as tied", "default", config=_config(tie_embeddings=True)),
    Fault("tied head reads another table", "llama3", config=_config(tie_embeddings=False),
          params=lambda params: {**params, "head": {
              **params["head"], "lm_head": jnp.roll(params["embed"]["embedding"], 1, axis=0)}}),
    Fault("softmax in bfloat16", "default", config=_config(softmax_dtype="bfloat16")),
    Fault("everything in bfloat16", "default", config=_config(dtype="bfloat16")),
    Fault("gradient: keys detached", "default", shows_in="gradients",
          patch=(decoder, "attend", lambda real: lambda q, k, v, **options: real(
              q, jax.lax.stop_gradient(k), v, **options))),
    Fault("gradient: norm statistics detached", "default", shows_in="gradients",
          patch=_norm(_detached_statistics)),
    Fault("gradient: tied table learns from the head only", "llama3", shows_in="gradients",
          patch=(whole, "embed", lambda real: lambda config, params, tokens, **sites: jax.lax.stop_gradient(
              real(config, params, tokens)))),
)  # fmt: skip


# --- measurements


def logits_error(oracle: Oracle, fault: Fault | None = None) -> float:
    """The largest difference of valid logits in units of their deviation, with a fault planted or without."""
    fault = fault or Fault("none", oracle.case.name)
    with fault.planted():
        ours = _our_logits(fault.config(oracle.config), fault.params(oracle.params), oracle)
    return float(np.abs(ours - oracle.logits)[oracle.valid].max() / oracle.deviation)


def gradient_errors(oracle: Oracle, fault: Fault | None = None) -> dict[str, float]:
    """By tensor: the largest difference of its gradient in units of the largest gradient of that tensor."""
    fault = fault or Fault("none", oracle.case.name)
    with fault.planted():
        ours = _our_gradients(fault.config(oracle.config), fault.params(oracle.params), oracle)
    theirs = _reference_gradients(oracle)
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))
    differences = {name: np.abs(ours[name] - theirs[name]).max() for name in theirs}
    return {name: float(value / np.abs(theirs[name]).max()) for name, value in differences.items()}


def fault_error(oracle: Oracle, fault: Fault) -> float:
    """The error, of the kind in which the fault shows."""
    if fault.shows_in == "logits":
        return logits_error(oracle, fault)
    return max(gradient_errors(oracle, fault).values())


def run() -> dict[str, Any]:
    """Every case, every fault; the report that `parity.json` holds."""
    oracles = {name: build(case) for name, case in CASES.items()}
    parity, gradients, mutations = [], [], []
    for name, oracle in oracles.items():
        case = dataclasses.asdict(oracle.case) | {"group": oracle.case.heads // oracle.case.kv_heads}
        error = logits_error(oracle)
        parity.append({"case": name, "error": error, "deviation": oracle.deviation, "model": case})
        worst, leaf = max((error, leaf) for leaf, error in gradient_errors(oracle).items())
        gradients.append({"case": name, "error": worst, "worst_tensor": leaf})
        print(f"{name:24} logits {error:.1e}  gradients {worst:.1e} ({leaf})")
    for fault in FAULTS:
        error = fault_error(oracles[fault.case], fault)
        factor = error / TOLERANCE[fault.shows_in]
        mutations.append({"fault": fault.name, "case": fault.case, "shows_in": fault.shows_in, "error": error,
                          "times_tolerance": factor})  # fmt: skip
        print(f"{fault.name:46} {fault.case:24} {error:.1e} = {factor:9.0f} x tolerance")
    ok = (
        all(row["error"] <= TOLERANCE["logits"] for row in parity)
        and all(row["error"] <= TOLERANCE["gradients"] for row in gradients)
        and all(row["times_tolerance"] >= VISIBLE for row in mutations)
    )
    return {
        "environment": runtime.environment(),
        "tolerance": TOLERANCE,
        "visible": VISIBLE,
        "ok": ok,
        "parity": parity,
        "gradients": gradients,
        "mutations": mutations,
    }


def main() -> int:
    """Print both tables, write the report; 1 when a bound is missed."""
    report = run()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    worst = {kind: max(row["error"] for row in report[kind]) for kind in ("parity", "gradients")}
    weakest = min(report["mutations"], key=lambda row: row["times_tolerance"])
    print(f"worst error of logits {worst['parity']:.1e}, of gradients {worst['gradients']:.1e}; weakest of")
    print(f"{len(FAULTS)} faults: {weakest['fault']}, {weakest['times_tolerance']:.0f} x tolerance; {RESULTS}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
