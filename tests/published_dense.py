"""config.json of published dense models, as their pages on the Hub hold them (transformers 4), and what they mean.

Most are from memory. Seen quoted in public repositories: Mistral-Nemo (kevinstephano/thunder_model_blocks), Qwen2-0.5B
(rwth-i6/i6_experiments) and Qwen3-4B-Instruct-2507 (akougkas/warpio-cli).
"""

import dataclasses

from jaxfw.models import DecoderConfig, Rope
from jaxfw.models.presets import preset

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_1_8B = LLAMA_3_8B | {
    "max_position_embeddings": 131072, "mlp_bias": False, "transformers_version": "4.43.0.dev0",
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "rope_scaling": LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}  # fmt: skip
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}, "vocab_size": 49152,
}  # fmt: skip
TINYLLAMA = LLAMA_2_7B | {
    "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
VICUNA_16K = LLAMA_2_7B | {
    "_name_or_path": "vicuna-7b-v1.5-16k", "do_sample": True, "max_length": 4096, "max_sequence_length": 16384,
    "pad_token_id": 0, "rope_scaling": {"factor": 4.0, "type": "linear"}, "temperature": 0.9, "top_p": 0.6,
}  # fmt: skip
CODE_LLAMA_7B = LLAMA_2_7B | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016}
DEEPSEEK_CODER = LLAMA_2_7B | {
    "bos_token_id": 32013, "eos_token_id": 32021, "max_position_embeddings": 16384, "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "vocab_size": 32256,
}  # fmt: skip
YARN_LLAMA_128K = LLAMA_2_7B | {
    "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
    "max_position_embeddings": 131072, "pad_token_id": 0,
    "rope_scaling": {"factor": 32.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_V03 = MISTRAL_7B_V01 | {
    "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.42.0.dev0",
    "vocab_size": 32768,
}  # fmt: skip
MISTRAL_NEMO = MISTRAL_7B_V03 | {
    "_name_or_path": "mistralai/Mistral-Nemo-Base-2407", "head_dim": 128, "hidden_size": 5120,
    "max_position_embeddings": 128000, "num_hidden_layers": 40, "transformers_version": "4.43.3",
    "vocab_size": 131072,
}  # fmt: skip
QWEN_2_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_2_5_7B = QWEN_2_05B | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "tie_word_embeddings": False, "use_mrope": False,
    "vocab_size": 152064,
}  # fmt: skip
# The page tells readers to add the scaling for long inputs.
QWEN_2_5_7B_INSTRUCT = QWEN_2_5_7B | {
    "eos_token_id": 151645, "max_position_embeddings": 32768, "transformers_version": "4.43.1",
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}  # fmt: skip
QWEN_3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3_4B_2507 = QWEN_3_06B | {
    "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 262144, "max_window_layers": 36,
    "num_attention_heads": 32, "num_hidden_layers": 36, "rope_theta": 5000000,
}  # fmt: skip
GPT_2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
GPT_2_MEDIUM = GPT_2 | {
    "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True,
}  # fmt: skip

PUBLISHED = {
    "Llama-2-7b": LLAMA_2_7B,
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "SmolLM2-135M": SMOLLM2_135M,
    "TinyLlama-1.1B": TINYLLAMA,
    "vicuna-7b-v1.5-16k": VICUNA_16K,
    "CodeLlama-7b": CODE_LLAMA_7B,
    "deepseek-coder-6.7b": DEEPSEEK_CODER,
    "Yarn-Llama-2-7b-128k": YARN_LLAMA_128K,
    "Mistral-7B-v0.1": MISTRAL_7B_V01,
    "Mistral-7B-v0.3": MISTRAL_7B_V03,
    "Mistral-Nemo-Base-2407": MISTRAL_NEMO,
    "Qwen2-0.5B": QWEN_2_05B,
    "Qwen2.5-7B": QWEN_2_5_7B,
    "Qwen2.5-7B-Instruct": QWEN_2_5_7B_INSTRUCT,
    "Qwen3-0.6B": QWEN_3_06B,
    "Qwen3-4B-Instruct-2507": QWEN_3_4B_2507,
    "gpt2": GPT_2,
    "gpt2-medium": GPT_2_MEDIUM,
}
_LLAMA3_ROPE = {"theta": 500000.0, "kind": "llama3", "original_positions": 8192}
_8B = {
    "vocab": 128256, "width": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128,
    "norm_eps": 1e-5, "param_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
_7B = {
    "vocab": 32000, "width": 4096, "ffn": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128,
    "positions": 4096, "norm_eps": 1e-5, "param_dtype": "bfloat16", "dtype": "bfloat16",
}  # fmt: skip
_QWEN = {
    "vocab": 151936, "rope": Rope(theta=1e6), "norm_eps": 1e-6, "tie_embeddings": True, "param_dtype": "bfloat16",
    "dtype": "bfloat16",
}  # fmt: skip
MEANT = {
    "Llama-2-7b": DecoderConfig(**_7B),
    "Llama-3-8B": DecoderConfig(**_8B, positions=8192, rope=Rope(theta=500000.0)),
    "Llama-3.1-8B": DecoderConfig(**_8B, positions=131072, rope=Rope(**_LLAMA3_ROPE, factor=8.0)),
    "Llama-3.2-1B": DecoderConfig(
        **_8B | {"width": 2048, "ffn": 8192, "layers": 16, "head_dim": 64}, positions=131072,
        rope=Rope(**_LLAMA3_ROPE, factor=32.0), tie_embeddings=True),
    "SmolLM2-135M": DecoderConfig(
        vocab=49152, width=576, ffn=1536, layers=30, heads=9, kv_heads=3, head_dim=64, positions=8192,
        rope=Rope(theta=100000.0), norm_eps=1e-5, tie_embeddings=True, init_std=1 / 24,
        param_dtype="bfloat16", dtype="bfloat16"),
    "TinyLlama-1.1B": DecoderConfig(
        **_7B | {"width": 2048, "ffn": 5632, "layers": 22, "kv_heads": 4, "head_dim": 64, "positions": 2048}),
    "vicuna-7b-v1.5-16k": DecoderConfig(**_7B, rope=Rope(kind="linear", factor=4.0)),
    "CodeLlama-7b": DecoderConfig(**_7B | {"vocab": 32016, "positions": 16384}, rope=Rope(theta=1e6)),
    "deepseek-coder-6.7b": DecoderConfig(
        **_7B | {"vocab": 32256, "positions": 16384, "norm_eps": 1e-6},
        rope=Rope(theta=1e5, kind="linear", factor=4.0)),
    "Yarn-Llama-2-7b-128k": DecoderConfig(
        **_7B | {"positions": 131072}, rope=Rope(kind="yarn", factor=32.0, original_positions=4096)),
    "Mistral-7B-v0.1": preset("mistral-7b-v0.1"),
    "Mistral-7B-v0.3": preset("mistral-7b-v0.3"),
    "Mistral-Nemo-Base-2407": DecoderConfig(
        vocab=131072, width=5120, ffn=14336, layers=40, heads=32, kv_heads=8, head_dim=128, positions=128000,
        rope=Rope(theta=1e6), norm_eps=1e-5, param_dtype="bfloat16", dtype="bfloat16"),
    "Qwen2-0.5B": DecoderConfig(
        **_QWEN, width=896, ffn=4864, layers=24, heads=14, kv_heads=2, head_dim=64, positions=131072, qkv_bias=True),
    "Qwen2.5-7B": preset("qwen2.5-7b"),
    "Qwen2.5-7B-Instruct": dataclasses.replace(
        preset("qwen2.5-7b"), positions=32768,
        rope=Rope(theta=1e6, kind="yarn", factor=4.0, original_positions=32768)),
    "Qwen3-0.6B": preset("qwen3-0.6b"),
    "Qwen3-4B-Instruct-2507": DecoderConfig(
        **_QWEN | {"rope": Rope(theta=5e6)}, width=2560, ffn=9728, layers=36, heads=32, kv_heads=8, head_dim=128,
        positions=262144, qk_norm="head"),
    "gpt2": preset("gpt2"),
    "gpt2-medium": preset("gpt2-medium"),
}  # fmt: skip


def in_version_5(attributes):
    """The same model as transformers 5 writes it."""
    older = ("rope_theta", "rope_scaling", "torch_dtype")
    newer = {name: value for name, value in attributes.items() if name not in older}
    newer |= {"dtype": attributes.get("torch_dtype"), "transformers_version": "5.0.0"}
    if attributes["model_type"] == "gpt2":
        return newer | {"n_inner": None, "add_cross_attention": False, "tie_word_embeddings": True}
    scaling = dict(attributes.get("rope_scaling") or {"rope_type": "default"})
    scaling.setdefault("rope_type", scaling.get("type"))
    newer["rope_parameters"] = {"rope_theta": attributes.get("rope_theta", 10000.0), **scaling}
    if "use_sliding_window" in attributes:  # and false
        newer |= {"sliding_window": None, "layer_types": ["full_attention"] * attributes["num_hidden_layers"]}
    return newer
