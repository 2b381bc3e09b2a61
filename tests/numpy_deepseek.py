"""The first DeepSeekMoE in plain numpy float64, token by token and expert by expert, from the tensors of a Hub file.

Written from the paper (Dai et al. 2024, arXiv:2401.06066, equations 3 to 5 and 9 to 11) and the published config.json;
nothing is taken from jaxfw.
"""

import numpy as np


def run(attributes, tensors, tokens):
    """Logits [T V] of one row of tokens [T], and the smallest lead of a chosen expert over one not, in log affinity."""
    a = attributes
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x, leads = w["model.embed_tokens.weight"][tokens], []
    for i in range(a["num_hidden_layers"]):
        name = f"model.layers.{i}"
        x = x + _attend(a, w, f"{name}.self_attn", _norm(a, x, w[f"{name}.input_layernorm.weight"]))
        hidden = _norm(a, x, w[f"{name}.post_attention_layernorm.weight"])
        if i >= a["first_k_dense_replace"] and i % a["moe_layer_freq"] == 0:
            x = x + np.stack([_mixture(a, w, f"{name}.mlp", token, leads) for token in hidden])
        else:
            x = x + _feed_forward(w, f"{name}.mlp", hidden)
    return _norm(a, x, w["model.norm.weight"]) @ w["lm_head.weight"].T, min(leads)


def _norm(a, x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + a["rms_norm_eps"]) * scale


def _feed_forward(w, name, x):
    gate = x @ w[f"{name}.gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T


def _mixture(a, w, name, token, leads):
    """Shared experts, one after the other, and the routed ones of largest affinity, weighted by it."""
    logits = w[f"{name}.gate.weight"] @ token
    affinity = np.exp(logits - logits.max())
    affinity /= affinity.sum()
    k = a["num_experts_per_tok"]
    order = sorted(range(len(affinity)), key=lambda e: -affinity[e])
    leads.append(np.log(affinity[order[k - 1]]) - np.log(affinity[order[k]]))
    total = sum(affinity[e] for e in order[:k]) if a["norm_topk_prob"] else 1.0
    out = sum(affinity[e] / total * _feed_forward(w, f"{name}.experts.{e}", token) for e in order[:k])
    width = a["moe_intermediate_size"]
    for s in range(a["n_shared_experts"]):
        rows = slice(s * width, (s + 1) * width)
        one = {f"{part}_proj.weight": w[f"{name}.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")}
        part = {f"one.{key}": value[:, rows] if key.startswith("down") else value[rows] for key, value in one.items()}
        out = out + _feed_forward(part, "one", token)
    return out


def _attend(a, w, name, x):
    H, K = a["num_attention_heads"], a["num_key_value_heads"]
    d, T = a["hidden_size"] // H, len(x)
    q, k, v = (x @ w[f"{name}.{part}_proj.weight"].T for part in "qkv")
    q, k, v = q.reshape(T, H, d), k.reshape(T, K, d), v.reshape(T, K, d)
    q, k = _rotate(q, a["rope_theta"]), _rotate(k, a["rope_theta"])
    out = np.zeros((T, H, d))
    for t, h in np.ndindex(T, H):
        logits = k[: t + 1, h // (H // K)] @ q[t, h] / np.sqrt(d)
        weights = np.exp(logits - logits.max())
        out[t, h] = weights / weights.sum() @ v[: t + 1, h // (H // K)]
    return out.reshape(T, H * d) @ w[f"{name}.o_proj.weight"].T


def _rotate(x, theta):
    """Pairs (i, i + d/2) of each head turned by position * theta^(-2i/d)."""
    d = x.shape[-1]
    out = np.empty_like(x)
    for t, i in np.ndindex(len(x), d // 2):
        angle = t * theta ** (-2 * i / d)
        one, two = x[t, :, i], x[t, :, i + d // 2]
        out[t, :, i] = one * np.cos(angle) - two * np.sin(angle)
        out[t, :, i + d // 2] = two * np.cos(angle) + one * np.sin(angle)
    return out
