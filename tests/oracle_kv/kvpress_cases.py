"""What kvpress 0.5.5 keeps: three architectures, three lengths, five ratios, all methods, in float64.

    .venv-oracle-kv/bin/python -m tests.oracle_kv.kvpress_cases    # writes tests/fixtures/kv

A fixture holds two layers' queries, keys and values of one architecture and length, and for each method and ratio the
positions that kvpress kept, as packed bits. kvpress is given the very tensors that are stored.
"""

from pathlib import Path

import kvpress
import numpy as np
import torch
from kvpress.utils import get_prerope_query_states
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

FIXTURES = Path(__file__).parents[1] / "fixtures" / "kv"
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LENGTHS, REMOVED, LAYERS, STORED = (200, 203, 512), (0.1, 0.3, 0.5, 0.7, 0.9), 4, (1, 3)
SHARP = 6  # without it, attention of fresh weights is flat and ranks nothing

PRESSES = {
    "streaming": lambda r: kvpress.StreamingLLMPress(r),
    "knorm": lambda r: kvpress.KnormPress(r),
    "keydiff": lambda r: kvpress.KeyDiffPress(r),
    "snapkv(w=16)": lambda r: kvpress.SnapKVPress(r, window_size=16),
    "h2o(recent=0,normalise=true)": lambda r: kvpress.ObservedAttentionPress(r),
    "tova": lambda r: kvpress.TOVAPress(r),
    "expected": lambda r: kvpress.ExpectedAttentionPress(r),
    "expected(epsilon=0.01)": lambda r: kvpress.ExpectedAttentionPress(r, epsilon=1e-2),
    "pyramidkv(w=16)": lambda r: kvpress.PyramidKVPress(r, window_size=16),
    "chunkkv(w=16,kernel=5,size=20,rule=count)": lambda r: kvpress.ChunkKVPress(
        kvpress.SnapKVPress(r, window_size=16), chunk_length=20
    ),
    "lagkv(lag=8)": lambda r: kvpress.LagKVPress(r, lag_size=8),
    "critical(w=8)": lambda r: kvpress.CriticalKVPress(kvpress.SnapKVPress(r, window_size=8)),
    "adakv(w=8)": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r, window_size=8)),
}


def model(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Fresh weights with attention that prefers some keys."""
    config_class, model_class = ARCHITECTURES[name]
    torch.manual_seed(sorted(ARCHITECTURES).index(name))
    config = config_class(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    made = model_class(config).eval().to(dtype)
    made.set_attn_implementation("eager")
    with torch.no_grad():
        for layer in made.model.layers:
            if name != "qwen3":  # which normalises queries and keys
                layer.self_attn.q_proj.weight *= SHARP**0.5
                layer.self_attn.k_proj.weight *= SHARP**0.5
            else:
                layer.self_attn.q_norm.weight *= 2
            for parameter in layer.self_attn.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return made


def ids(T: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(T))


class Recorder(kvpress.BasePress):
    """Takes what every layer hands to a press, and compresses nothing."""

    def __init__(self):
        self.calls = []

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        self.calls.append((module, hidden_states, keys, values, attentions, kwargs))
        return keys, values


def record(made, T: int) -> list:
    recorder = Recorder()
    with torch.no_grad(), recorder(made):
        made.model(ids(T), use_cache=True)
    return recorder.calls


def kept(press, call) -> np.ndarray:
    """Bool [K T]: found by comparing the keys that came back with those that were given, or told by a mask."""
    module, hidden, keys, values, attentions, kwargs = call
    if isinstance(press, kvpress.AdaKVPress):
        return told(press, call)
    if not isinstance(press, kvpress.ObservedAttentionPress):
        attentions = None
    with torch.no_grad():
        press.post_init_from_model(module) if isinstance(press, kvpress.ChunkKVPress) else None
        out, _ = press.compress(module, hidden, keys, values, attentions, kwargs)
    found = np.zeros(keys.shape[1:3], bool)
    for head in range(keys.shape[1]):
        distance = (out[0, head, :, None] - keys[0, head, None]).abs().amax(dim=-1)
        assert float(distance.min(dim=1).values.max()) == 0
        found[head, distance.argmin(dim=1).numpy()] = True
    return found


def told(press, call) -> np.ndarray:
    """Of a press that leaves keys where they are, and says which are not to be attended to."""
    module, hidden, keys, values, _, kwargs = call
    implementation = module.config._attn_implementation
    module.config._attn_implementation = "sdpa"
    with torch.no_grad():
        press.compress(module, hidden, keys, values, None, kwargs)
    module.config._attn_implementation = implementation
    _, heads, positions = module.masked_key_indices
    module.masked_key_indices = None
    found = np.ones(keys.shape[1:3], bool)
    found[heads.numpy(), positions.numpy()] = False
    return found


def arrays(call) -> dict[str, np.ndarray]:
    """A layer's queries before and after rotation, keys and values: [T heads d]; its output projection [H*d D]."""
    module, hidden, keys, values, _, kwargs = call
    with torch.no_grad():
        q_pre = get_prerope_query_states(module, hidden)
        cos, sin = (part.unsqueeze(1) for part in kwargs["position_embeddings"])
        q = q_pre * cos + rotate_half(q_pre) * sin
    parts = {"q_pre": q_pre, "q": q, "k": keys, "v": values}
    out = {name: x[0].transpose(0, 1).numpy() for name, x in parts.items()}
    return out | {"w_o": module.o_proj.weight.detach().T.numpy()}


def main() -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in ARCHITECTURES:
        made = model(name)
        for T in LENGTHS:
            calls = record(made, T)
            out = {}
            for layer in STORED:
                out |= {f"{layer}/{part}": x for part, x in arrays(calls[layer]).items()}
                for method, press in PRESSES.items():
                    for removed in REMOVED:
                        found = kept(press(removed), calls[layer])
                        out[f"{layer}/kept/{method}/{removed}"] = np.packbits(found, axis=1)
            path = FIXTURES / f"{name}_{T}.npz"
            np.savez_compressed(path, **out)
            print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
