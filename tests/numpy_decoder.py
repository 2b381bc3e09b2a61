"""The decoder in plain numpy float64, token by token, with a hook at every site; and edits by loops over a mask.

Nothing here is taken from jaxfw but the layout of parameters: it is what tests of taps compare with.
"""

import math

import numpy as np


def run(config, params, tokens, lengths, hook=lambda site, layer, x: x):
    """Logits [B T V]; rows are cut to their length, so that padding cannot matter, and zero beyond it.

    `hook(site, layer, x [B T ...])` returns what goes on; layer is None outside of the layers.
    """
    c, T = config, tokens.shape[1]
    valid = (np.arange(T) < np.asarray(lengths)[:, None])[..., None]

    def at(site, layer, x):
        mask = valid.reshape(*valid.shape, *[1] * (x.ndim - 3))
        return np.where(mask, hook(site, layer, np.where(mask, x, 0)), 0)

    def rms(x, p):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * p["scale"]

    def norm(x, p):
        if c.norm == "rms":
            return rms(x, p)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps) * p["scale"] + p["bias"]

    def project(x, p):
        return x @ p["kernel"] + p.get("bias", 0)

    x = params["embed"]["embedding"][tokens]
    if c.learned_positions:
        x = x + params["embed"]["positions"][:T]
    x = at("embed", None, x)
    for i in range(c.layers):
        p = params[f"layers_{i}"]
        x = at("resid/in", i, x)
        hidden = at("attn/in", i, norm(x, p["attn_norm"]))
        heads = {name: project(hidden, p["attn"][name]) for name in "qkv"}
        if c.qk_norm == "projection":
            heads |= {name: rms(heads[name], p["attn"][f"{name}_norm"]) for name in "qk"}
        q, k, v = (heads[name].reshape(*x.shape[:2], -1, c.head_dim) for name in "qkv")
        if c.qk_norm == "head":
            q, k = rms(q, p["attn"]["q_norm"]), rms(k, p["attn"]["k_norm"])
        q, k = at("attn/q_pre", i, q), at("attn/k_pre", i, k)
        if c.rope:
            q, k = _rotate(q, c.rope.theta), _rotate(k, c.rope.theta)
        q, k = at("attn/q", i, q), at("attn/k", i, k)
        out, lse = _attend(q, k, at("attn/v", i, v), None if i in c.full_attention else c.window)
        at("attn/lse", i, lse)
        out = at("attn/head_out", i, out).reshape(*x.shape[:2], -1)
        x = x + at("attn/out", i, project(out, p["attn"]["o"]))
        x = at("resid/mid", i, x)
        hidden = at("mlp/in", i, norm(x, p["mlp_norm"]))
        if "mlp" in p:
            out = at("mlp/key", i, _ffn_key(hidden, p["mlp"], c.activation, project))
            out = project(out, p["mlp"]["down"])
        else:
            out = _experts(p["moe"], hidden, c.moe.per_token, lambda site, x, i=i: at(site, i, x))
            if c.moe.shared:
                shared = p["moe"]["shared"]
                always = project(_ffn_key(hidden, shared, c.activation, project), shared["down"])
                gate = _sigmoid(project(hidden, p["moe"]["shared_gate"])) if c.moe.shared_gate else 1
                out = out + gate * always
        x = at("resid/out", i, x + at("mlp/out", i, out))
    x = at("final", None, norm(x, params["head"]["norm"]))
    table = params["embed"]["embedding"] if c.tie_embeddings else params["head"]["lm_head"]
    return np.where(valid, x @ table.T, 0)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


_ACTIVATIONS = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def _ffn_key(x, p, activation, project):
    act, up = _ACTIVATIONS[activation], project(x, p["up"])
    return act(project(x, p["gate"])) * up if "gate" in p else act(up)


def _rotate(x, theta):
    d = x.shape[-1]
    angles = np.arange(x.shape[1])[:, None, None] * theta ** (-np.arange(0, d, 2) / d)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], axis=-1
    )


def _attend(q, k, v, window):
    B, T, H, d = q.shape
    out, lse = np.zeros(q.shape), np.zeros((B, T, H))
    for b, t, h in np.ndindex(B, T, H):
        first, group = 0 if window is None else max(0, t - window + 1), h // (H // k.shape[2])
        logits = k[b, first : t + 1, group] @ q[b, t, h] / np.sqrt(d)
        lse[b, t, h] = np.logaddexp.reduce(logits)
        out[b, t, h] = np.exp(logits - lse[b, t, h]) @ v[b, first : t + 1, group]
    return out, lse


def _experts(p, hidden, k, at):
    """Softmax over the chosen k logits (k > 1)."""
    logits = hidden @ p["router"]["kernel"]
    probs = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    at("moe/probs", probs)
    at("moe/ids", ids)
    out = np.zeros_like(hidden)
    for b, t in np.ndindex(hidden.shape[:2]):
        shares = np.exp(logits[b, t, ids[b, t]])
        for e, share in zip(ids[b, t], shares / shares.sum()):
            gate, up, down = (p["experts"][name][e] for name in ("gate", "up", "down"))
            out[b, t] += share * (_ACTIVATIONS["silu"](hidden[b, t] @ gate) * (hidden[b, t] @ up)) @ down
    return out


def editing(edits):
    """A hook that makes these edits in order: dicts with the fields of `Edit`."""

    def hook(site, layer, x):
        for edit in edits:
            if edit["site"] == site:
                x = _edited(edit, layer, x)
        return x

    return hook


def _edited(edit, layer, x):
    B, T, *dims = x.shape
    first, last = edit.get("layers") or (0, np.inf)
    if layer is not None and not first <= layer <= last:
        return x
    x, pos, rows = x.copy(), edit.get("pos"), edit.get("rows")
    wanted = (B, T if pos is None else pos.shape[1], *dims)
    value = np.broadcast_to(np.asarray(edit["value"], np.float64), wanted)
    weight = np.broadcast_to(np.asarray(1.0 if edit.get("weight") is None else edit["weight"], np.float64), wanted)
    for b in range(B):
        if rows is not None and not rows[b]:
            continue
        for t in range(T):
            at = t
            if pos is not None:
                named = [p for p in range(pos.shape[1]) if pos[b, p] == t]
                if not named:
                    continue
                at = named[0]
            old, v, w = x[b, t], value[b, at], weight[b, at]
            x[b, t] = {"set": v, "add": old + v, "scale": old * v, "lerp": (1 - w) * old + w * v}[edit["op"]]
    return x
