"""What is compared: a small model in transformers' terms, and the same model on both sides."""

import copy
import dataclasses
import functools
import re
import tempfile
from typing import Any

import numpy as np

from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig
from jaxfw.weights import load

# Of what `make_model` draws, by a pattern of names.
SHARP = 6  # query and key projections: attention that picks few tokens
SHARP_NORMS = 1.5  # norms of queries and keys, behind which the size of the projections is gone
TIED = 8  # the last norm, where the head is as small as the embedding that it equals


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model and the lengths of the rows it is compared on.

    Attributes:
        name: of the case, which also seeds the parameters together with `seed`.
        model_type: transformers' name of the family.
        attributes: of the family's configuration in transformers.
        lengths: valid tokens of each row.
        scales: further factors of drawn parameters, (pattern that transformers' name contains, factor).
        seed: another gives other parameters.
    """

    name: str
    model_type: str
    attributes: dict[str, Any]
    lengths: tuple[int, ...] = (144, 77, 9)
    scales: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary embedding as transformers describes it; {} without one."""
        return self.attributes.get("rope_parameters", {})

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.attributes["tie_word_embeddings"]


def decoder_case(
    name: str,
    model_type: str,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    rope: dict[str, Any] | None = None,
    layers: int = 2,
    tied: bool = False,
    lengths: tuple[int, ...] = (144, 77, 9),
    scales: tuple[tuple[str, float], ...] = (),
    seed: int = 0,
    **attributes: Any,
) -> Case:
    """A case of LLaMA or a family after it; `attributes` add to those that all have, or replace them."""
    shared = {
        "vocab_size": 96, "hidden_size": width, "intermediate_size": 2 * width + 8, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16, "max_position_embeddings": 256,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return Case(name, model_type, shared | attributes, lengths, scales, seed)


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

    @functools.cached_property
    def gradients(self) -> Any:
        """Transformers' gradients of the mean next-token loss over valid tokens, as a tree of our parameters."""
        return _reference_gradients(self)


def libraries() -> tuple[Any, Any]:
    """Torch and transformers, silenced.

    Raises:
        InputError: they are not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"Parity needs {error.name}: pip install -e '.[oracle]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def make_model(case: Case) -> Any:
    """A float32 transformers model whose every parameter matters to the logits."""
    torch, transformers = libraries()
    config = transformers.AutoConfig.for_model(case.model_type, **copy.deepcopy(case.attributes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng([case.seed, *case.name.encode()])
    for name, tensor in model.named_parameters():
        value = _draw(name, tuple(tensor.shape), rng, case)
        tensor.data.copy_(torch.from_numpy(value.astype(np.float32)))
    return model


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator, case: Case) -> np.ndarray:
    drawn = rng.standard_normal(shape)
    if re.search(r"(norm|ln_\w)\.weight$", name):
        value = rng.uniform(0.5, 1.5, shape)
        if re.search(r"[qk]_norm", name):
            value *= SHARP_NORMS
        elif case.tied and re.search(r"(model\.norm|ln_f)\.", name):
            value *= TIED
    elif name.endswith("bias"):
        value = 0.2 * drawn
    elif re.search(r"embed_tokens|w[tp]e", name):
        value = 0.02 * drawn
    elif "lm_head" in name:
        value = 0.16 * drawn
    else:
        value = 0.025 * drawn
    if re.search(r"[qk]_proj\.weight", name):
        value *= SHARP
    elif "c_attn.weight" in name:  # queries, keys and values side by side
        value[:, : 2 * shape[1] // 3] *= SHARP
    for pattern, factor in case.scales:
        value *= factor if re.search(pattern, name) else 1
    return value


def build(case: Case) -> Oracle:
    """The model of a case through `save_pretrained` and `jaxfw.weights.load`, and transformers' logits."""
    model = make_model(case)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        checkpoint = load(directory)
    shape = (len(case.lengths), max(case.lengths))
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, shape, np.int32)
    oracle = Oracle(case, model, checkpoint.config, checkpoint.params, tokens, np.empty(()))
    oracle.logits = reference_logits(oracle).detach().numpy()
    return oracle


def reference_logits(oracle: Oracle) -> Any:
    """Transformers' logits of all rows, a torch tensor [B T V]."""
    torch, _ = libraries()
    tokens, model = torch.from_numpy(oracle.tokens).long(), oracle.model
    if oracle.case.rope.get("rope_type") != "dynamic":
        return model(input_ids=tokens, attention_mask=torch.from_numpy(oracle.valid).long()).logits
    rows = []
    for row, length in zip(tokens, oracle.case.lengths):
        restart(model)
        logits = model(input_ids=row[None, :length]).logits[0]
        rows.append(torch.nn.functional.pad(logits, (0, 0, 0, tokens.shape[1] - length)))
    return torch.stack(rows)


def restart(model: Any) -> None:
    """Forget the longest row so far, whose frequencies a model with `dynamic` rotation would keep."""
    if hasattr(model.base_model, "rotary_emb"):
        model.base_model.rotary_emb = type(model.base_model.rotary_emb)(model.config)


def _reference_gradients(oracle: Oracle) -> Any:
    torch, _ = libraries()
    oracle.model.zero_grad()
    log_probs = torch.log_softmax(reference_logits(oracle)[:, :-1], dim=-1)
    targets = torch.from_numpy(oracle.tokens[:, 1:]).long()[..., None]
    chosen = torch.gather(log_probs, -1, targets)[..., 0]
    (-chosen[torch.from_numpy(oracle.valid[:, 1:])].mean()).backward()
    # Gradients have the layout of their parameters: saved in their place, they are read as parameters are.
    holder = copy.deepcopy(oracle.model)
    for place, tensor in zip(holder.parameters(), oracle.model.parameters(), strict=True):
        place.data.copy_(tensor.grad)
    with tempfile.TemporaryDirectory() as directory:
        holder.save_pretrained(directory)
        return load(directory).params
