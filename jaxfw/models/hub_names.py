"""Where a decoder's parameters lie in the tensors of a Hugging Face file, as data that reading and writing share."""

import dataclasses
from collections.abc import Mapping

from jaxfw.nn.config import DecoderConfig

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors that one parameter is read from.

    Attributes:
        names: one tensor; or one an expert, stacked here on a new first axis.
        transposed: whether the last two axes are the other way round there: [out, in] for a kernel [in, out].
        part: (start, size) along the last axis here, where several parameters share one tensor.
    """

    names: tuple[str, ...]
    transposed: bool = False
    part: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """What a family calls the parts of a mixture, under a layer's own prefix; `{e}` is an expert's number."""

    router: str = "mlp.gate"
    expert: str = "mlp.experts.{e}"
    projections: Mapping[str, str] = dataclasses.field(default_factory=lambda: PROJECTIONS)
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"


def llama_tensors(
    config: DecoderConfig, experts: ExpertNames | None = None, *, projections: Mapping[str, str] = PROJECTIONS
) -> dict[str, Stored]:
    """Every parameter's path, joined by '/', by the names that LLaMA and the families after it use.

    `projections` names those of a dense feed-forward.

    >>> tiny = DecoderConfig(vocab=8, width=4, ffn=8, layers=1, heads=2, kv_heads=1, head_dim=2, positions=8)
    >>> llama_tensors(tiny)["layers_0/attn/q/kernel"]
    Stored(names=('model.layers.0.self_attn.q_proj.weight',), transposed=True, part=None)
    """
    tensors = {"embed/embedding": Stored(("model.embed_tokens.weight",)), **_norm(config, "head/norm", "model.norm")}
    if not config.tie_embeddings:
        tensors["head/lm_head"] = Stored(("lm_head.weight",))
    for i in range(config.layers):
        ours, theirs = f"layers_{i}", f"model.layers.{i}"
        here = _attention(config)
        if config.moe is not None and config.moe.is_in(i):
            here |= _mixture(config, experts or ExpertNames())
        else:
            here |= _projections("mlp", "mlp", config.mlp_bias, projections)
        for path, stored in here.items():
            names = tuple(f"{theirs}.{name}" for name in stored.names)
            tensors[f"{ours}/{path}"] = dataclasses.replace(stored, names=names)
    return tensors


def _norm(config: DecoderConfig, ours: str, theirs: str) -> dict[str, Stored]:
    tensors = {f"{ours}/scale": Stored((f"{theirs}.weight",))}
    return tensors | ({f"{ours}/bias": Stored((f"{theirs}.bias",))} if config.norm == "layer" else {})


def _attention(config: DecoderConfig) -> dict[str, Stored]:
    tensors = {
        **_norm(config, "attn_norm", "input_layernorm"),
        **_norm(config, "mlp_norm", "post_attention_layernorm"),
        **_projections("attn", "self_attn", config.qkv_bias, {x: f"{x}_proj" for x in "qkv"}),
        **_projections("attn", "self_attn", config.out_bias, {"o": "o_proj"}),
    }
    if config.qk_norm:
        tensors |= {f"attn/{x}_norm/scale": Stored((f"self_attn.{x}_norm.weight",)) for x in "qk"}
    return tensors


def _mixture(config: DecoderConfig, names: ExpertNames) -> dict[str, Stored]:
    moe = config.moe
    assert moe is not None
    tensors = {"moe/router/kernel": Stored((f"{names.router}.weight",), transposed=True)}
    for ours, theirs in names.projections.items():
        each = tuple(f"{names.expert.format(e=e)}.{theirs}.weight" for e in range(moe.experts))
        tensors[f"moe/experts/{ours}"] = Stored(each, transposed=True)
    if moe.shared:
        tensors |= _projections("moe/shared", names.shared, False, names.projections)
    if moe.shared_gate:
        tensors["moe/shared_gate/kernel"] = Stored((f"{names.shared_gate}.weight",), transposed=True)
    return tensors


def _projections(ours: str, theirs: str, has_bias: bool, names: Mapping[str, str]) -> dict[str, Stored]:
    tensors = {}
    for part, name in names.items():
        tensors[f"{ours}/{part}/kernel"] = Stored((f"{theirs}.{name}.weight",), transposed=True)
        if has_bias:
            tensors[f"{ours}/{part}/bias"] = Stored((f"{theirs}.{name}.bias",))
    return tensors
