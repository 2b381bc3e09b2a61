"""Published models by name: their sizes, as their config.json files have them; no weights."""

from typing import Any

from jaxfw.core.errors import unknown
from jaxfw.nn.config import DecoderConfig, MoEConfig
from jaxfw.ops.rope import Rope


def _decoder(layers: int, width: int, ffn: int, heads: int, kv_heads: int, **fields: Any) -> DecoderConfig:
    """A decoder in bfloat16, whose heads divide its width unless `head_dim` says otherwise."""
    fields = {"head_dim": width // heads, "param_dtype": "bfloat16", "dtype": "bfloat16"} | fields
    return DecoderConfig(layers=layers, width=width, ffn=ffn, heads=heads, kv_heads=kv_heads, **fields)


def _llama_2(layers: int, width: int, ffn: int, heads: int, kv_heads: int) -> DecoderConfig:
    return _decoder(layers, width, ffn, heads, kv_heads, vocab=32000, positions=4096, norm_eps=1e-5)


def _llama_3(layers: int, width: int, ffn: int, heads: int, *, stretch: float, tied: bool = False) -> DecoderConfig:
    rope = Rope(theta=500000.0, kind="llama3", factor=stretch, original_positions=8192)
    return _decoder(
        layers, width, ffn, heads, 8, vocab=128256, positions=131072, rope=rope, norm_eps=1e-5, tie_embeddings=tied
    )


def _mistral(**fields: Any) -> DecoderConfig:
    return _decoder(32, 4096, 14336, 32, 8, positions=32768, norm_eps=1e-5, **fields)


def _qwen_2_5(layers: int, width: int, ffn: int, heads: int, kv_heads: int, **fields: Any) -> DecoderConfig:
    fields = {"vocab": 152064, "positions": 131072, "rope": Rope(theta=1e6), "qkv_bias": True} | fields
    return _decoder(layers, width, ffn, heads, kv_heads, **fields)


def _qwen_3(layers: int, width: int, ffn: int, heads: int, **fields: Any) -> DecoderConfig:
    fields = {"vocab": 151936, "positions": 40960, "rope": Rope(theta=1e6), "qk_norm": "head", "head_dim": 128} | fields
    return _decoder(layers, width, ffn, heads, fields.pop("kv_heads", 8), **fields)


def _gpt_2(layers: int, width: int, heads: int) -> DecoderConfig:
    return _decoder(
        layers, width, 4 * width, heads, heads, vocab=50257, positions=1024, rope=None, learned_positions=True,
        norm="layer", norm_eps=1e-5, activation="gelu_tanh", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        tie_embeddings=True,
    )  # fmt: skip


def _mixtral(layers: int, width: int, ffn: int, heads: int, positions: int) -> DecoderConfig:
    moe = MoEConfig(experts=8, per_token=2, ffn=ffn, renormalize=True)
    return _decoder(
        layers, width, ffn, heads, 8, vocab=32000, positions=positions, rope=Rope(theta=1e6), norm_eps=1e-5, moe=moe
    )


def _switch(experts: int) -> DecoderConfig:
    """The sizes of Switch-Base (Fedus et al. 2021, arXiv:2101.03961), as a decoder of this kind.

    One expert a token, its answer times its probability; every second layer has experts, from the second on.
    """
    moe = MoEConfig(experts=experts, per_token=1, ffn=2048, first=1, every=2, renormalize=False)
    return _decoder(12, 768, 2048, 12, 12, vocab=32128, positions=2048, moe=moe)


_MOE_QWEN_2 = {"vocab": 151936, "rope": Rope(theta=1e6), "qkv_bias": True}

PRESETS = {
    "llama-2-7b": _llama_2(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama_2(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama_2(80, 8192, 28672, 64, 8),
    "llama-3.1-8b": _llama_3(32, 4096, 14336, 32, stretch=8.0),
    "llama-3.1-70b": _llama_3(80, 8192, 28672, 64, stretch=8.0),
    "llama-3.2-1b": _llama_3(16, 2048, 8192, 32, stretch=32.0, tied=True),
    "llama-3.2-3b": _llama_3(28, 3072, 8192, 24, stretch=32.0, tied=True),
    "mistral-7b-v0.1": _mistral(vocab=32000, window=4096),
    "mistral-7b-v0.3": _mistral(vocab=32768, rope=Rope(theta=1e6)),
    "qwen2.5-0.5b": _qwen_2_5(24, 896, 4864, 14, 2, vocab=151936, positions=32768, tie_embeddings=True),
    "qwen2.5-1.5b": _qwen_2_5(28, 1536, 8960, 12, 2, vocab=151936, tie_embeddings=True),
    "qwen2.5-7b": _qwen_2_5(28, 3584, 18944, 28, 4),
    "qwen2.5-32b": _qwen_2_5(64, 5120, 27648, 40, 8, norm_eps=1e-5),
    "qwen2.5-72b": _qwen_2_5(80, 8192, 29568, 64, 8, norm_eps=1e-5),
    "qwen3-0.6b": _qwen_3(28, 1024, 3072, 16, tie_embeddings=True),
    "qwen3-1.7b": _qwen_3(28, 2048, 6144, 16, tie_embeddings=True),
    "qwen3-8b": _qwen_3(36, 4096, 12288, 32),
    "qwen3-32b": _qwen_3(64, 5120, 25600, 64),
    "gpt2": _gpt_2(12, 768, 12),
    "gpt2-medium": _gpt_2(24, 1024, 16),
    "gpt2-large": _gpt_2(36, 1280, 20),
    "gpt2-xl": _gpt_2(48, 1600, 25),
    "mixtral-8x7b": _mixtral(32, 4096, 14336, 32, positions=32768),
    "mixtral-8x22b": _mixtral(56, 6144, 16384, 48, positions=65536),
    "qwen1.5-moe-a2.7b": _decoder(
        24, 2048, 5632, 16, 16, positions=8192, **_MOE_QWEN_2,
        moe=MoEConfig(experts=60, per_token=4, ffn=1408, shared=5632, shared_gate=True, renormalize=False),
    ),
    "qwen2-57b-a14b": _decoder(
        28, 3584, 18944, 28, 4, positions=131072, **_MOE_QWEN_2,
        moe=MoEConfig(experts=64, per_token=8, ffn=2560, shared=20480, shared_gate=True, renormalize=False),
    ),
    "qwen3-30b-a3b": _qwen_3(
        48, 2048, 6144, 32, kv_heads=4, moe=MoEConfig(experts=128, per_token=8, ffn=768, renormalize=True)
    ),
    "olmoe-1b-7b": _decoder(
        16, 2048, 1024, 16, 16, vocab=50304, positions=4096, norm_eps=1e-5, qk_norm="projection",
        moe=MoEConfig(experts=64, per_token=8, ffn=1024, renormalize=False),
    ),
    "deepseek-moe-16b": _decoder(
        28, 2048, 10944, 16, 16, vocab=102400, positions=4096,
        moe=MoEConfig(experts=64, per_token=6, ffn=1408, first=1, shared=2 * 1408, renormalize=False),
    ),
    "switch-8": _switch(8),
}  # fmt: skip


def preset(name: str) -> DecoderConfig:
    """The configuration of a published model, in bfloat16.

    >>> preset("llama-3.1-8b").layers
    32

    Raises:
        InputError: the name is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
