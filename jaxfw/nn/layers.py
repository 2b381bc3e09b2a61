"""The parts of a decoder as Linen shells: embedding, attention projections, feed-forward, block, head."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfw.core.errors import InputError
from jaxfw.core.shapes import Array, Float, Int
from jaxfw.nn.config import DecoderConfig
from jaxfw.ops.activations import ACTIVATIONS
from jaxfw.ops.adapted import Adapted, added, whole
from jaxfw.ops.norms import layer_norm, rms_norm
from jaxfw.ops.quant import Quantised, product

# (q [B T H d], k [B T K d], v [B T K d], hidden [B T D], w_o [H*d D]) -> (heads [B T H d], anything)
Mix = Callable[..., tuple[Array, Any]]
# (site, value) -> value: shows a value under its name in the site table, and goes on with what comes back
Tap = Callable[[str, Array], Array]
Matrix = Array | Quantised | Adapted


def _pass(site: str, x: Array) -> Array:
    return x


class Norm(nn.Module):
    """Declares `scale` [D], of kind "layer" also `bias` [D], and normalises the last axis."""

    config: DecoderConfig
    kind: str

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        shape, dtype, eps = x.shape[-1:], jnp.dtype(self.config.param_dtype), self.config.norm_eps
        scale = self.param("scale", nn.initializers.ones, shape, dtype)
        if self.kind == "rms":
            return rms_norm(x, scale, eps=eps)
        return layer_norm(x, scale, self.param("bias", nn.initializers.zeros, shape, dtype), eps=eps)


def _token_dot(x: Float[Array, "B T D"], matrix: Matrix, *, axis: int = 0) -> Float[Array, "B T F"]:
    """The last axis of x times the matrix's `axis`, as one product of two matrices: [B*T D] with the kernel.

    With B and T apart, XLA's CPU backend transposes and copies activations for every kernel's gradient (a feed-forward
    takes half as long again). Not on a mesh of several devices: there B and T may be sharded over different axes,
    and merging them would move every activation between devices.
    """
    rows = x if jax.sharding.get_abstract_mesh().size > 1 else x.reshape(-1, x.shape[-1])
    if isinstance(matrix, Adapted):
        out = _token_dot(rows, matrix.kernel) + added(rows, matrix)
    elif isinstance(matrix, Quantised):
        out = product(rows, matrix)
    else:
        out = jax.lax.dot_general(rows, matrix.astype(x.dtype), (((rows.ndim - 1,), (axis,)), ((), ())))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _matrix(module: nn.Module, config: DecoderConfig, name: str, shape: tuple[int, int]) -> Matrix:
    """The parameter of that name; a quantised or adapted one, with other arrays than those declared, as it is given."""
    given = None if module.is_initializing() else module.get_variable("params", name)
    if not isinstance(given, Quantised | Adapted):
        return module.param(name, nn.initializers.normal(config.init_std), shape, jnp.dtype(config.param_dtype))
    if given.shape != shape:
        kind = type(given).__name__.lower()
        raise InputError(f"the {kind} {name} is {list(given.shape)}, the config asks for {list(shape)}.")
    return given


class Dense(nn.Module):
    """Declares `kernel` [D features] and perhaps `bias`, and multiplies in the config's dtype."""

    config: DecoderConfig
    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        x = x.astype(self.config.dtype)
        y = _token_dot(x, _matrix(self, self.config, "kernel", (x.shape[-1], self.features)))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.dtype(self.config.param_dtype))
        return y + bias.astype(y.dtype)


class Attention(nn.Module):
    """Declares the four projections and their norms; how queries meet keys is `mix`, given by the caller."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.q = Dense(c, c.heads * c.head_dim, c.qkv_bias)
        self.k = Dense(c, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = Dense(c, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = Dense(c, c.width, c.out_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c, "rms"), Norm(c, "rms")

    def _queries_and_keys(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T H d"], Array]:
        c, (B, T, _) = self.config, hidden.shape
        q, k = self.q(hidden), self.k(hidden)
        if c.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.reshape(B, T, c.heads, c.head_dim), k.reshape(B, T, c.kv_heads, c.head_dim)
        return (self.q_norm(q), self.k_norm(k)) if c.qk_norm == "head" else (q, k)

    def __call__(self, hidden: Float[Array, "B T D"], mix: Mix) -> tuple[Float[Array, "B T D"], Any]:
        c, (B, T, _) = self.config, hidden.shape
        q, k = self._queries_and_keys(hidden)
        v = self.v(hidden).reshape(B, T, c.kv_heads, c.head_dim)
        w_o = None if self.is_initializing() else self.o.variables["params"]["kernel"]
        w_o = whole(w_o, c.dtype) if isinstance(w_o, Quantised | Adapted) else w_o  # computed where a policy reads it
        heads, state = mix(q, k, v, hidden, w_o)
        return self.o(heads.reshape(B, T, c.heads * c.head_dim)), state


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), or down(act(up(x))) without a gate."""

    config: DecoderConfig
    width: int
    use_bias: bool

    def setup(self):
        c = self.config
        if c.gated:
            self.gate = Dense(c, self.width, self.use_bias)
        self.up = Dense(c, self.width, self.use_bias)
        self.down = Dense(c, c.width, self.use_bias)

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = _pass) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return self.down(tap("mlp/key", act(self.up(x))))
        # Gradients recompute the product: kept, its factors would double what a layer holds of [B T F].
        gated = jax.checkpoint(lambda gate, up: act(gate) * up)
        return self.down(tap("mlp/key", gated(self.gate(x), self.up(x))))


class MoE(nn.Module):
    """Declares `router`, as the router's own `init` makes it, and `experts`: gate, up [E D F] and down [E F D].

    What those compute is `jaxfw.models.routing`'s. What every token passes is here: `shared` and its gate.
    """

    config: DecoderConfig
    router: Any

    def setup(self):
        moe = self.config.moe
        assert moe is not None
        if moe.shared:
            self.shared = FeedForward(self.config, moe.shared, use_bias=False)
        if moe.shared_gate:
            self.shared_gate = Dense(self.config, 1, False)

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Declares everything, and returns what all tokens pass."""
        c, moe = self.config, self.config.moe
        assert moe is not None
        dtype, D, E, F = jnp.dtype(c.param_dtype), c.width, moe.experts, moe.ffn
        self.param("router", lambda key: self.router.init(key, D, E, std=c.init_std, dtype=dtype))
        shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
        if not c.gated:
            del shapes["gate"]

        def init_experts(key):
            keys = jax.random.split(key, len(shapes))
            draw = nn.initializers.normal(c.init_std)
            return {name: draw(k, shape, dtype) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

        self.param("experts", init_experts)
        return self.for_all(x)

    def for_all(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the shared feed-forward adds to the experts' answers; zeros without one."""
        moe = self.config.moe
        assert moe is not None
        if not moe.shared:
            return jnp.zeros_like(x)
        out = self.shared(x)
        return out * nn.sigmoid(self.shared_gate(x)) if moe.shared_gate else out


class Block(nn.Module):
    """One layer: attention and feed-forward (or, with a `router`, experts), behind norms, added to the residual."""

    config: DecoderConfig
    router: Any = None

    def setup(self):
        c = self.config
        self.attn_norm = Norm(c, c.norm)
        self.attn = Attention(c)
        self.mlp_norm = Norm(c, c.norm)
        if self.router is None:
            self.mlp = FeedForward(c, c.ffn, c.mlp_bias)
        else:
            self.moe = MoE(c, self.router)

    def attend_half(self, x: Float[Array, "B T D"], mix: Mix, tap: Tap = _pass) -> tuple[Float[Array, "B T D"], Any]:
        """The residual after attention, and what `mix` returned beside the heads."""
        out, state = self.attn(tap("attn/in", self.attn_norm(x)), mix)
        return x + tap("attn/out", out), state

    def mlp_input(self, x: Float[Array, "B T D"], tap: Tap = _pass) -> Float[Array, "B T D"]:
        """The normalised residual that the feed-forward part, or router and experts, read."""
        return tap("mlp/in", self.mlp_norm(x))

    def shared_expert(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What every token gets beside its experts' answers."""
        return self.moe.for_all(hidden)

    def mlp_half(self, x: Float[Array, "B T D"], tap: Tap = _pass) -> Float[Array, "B T D"]:
        """The residual after the feed-forward part."""
        hidden = self.mlp_input(x, tap)
        out = self.mlp(hidden, tap) if self.router is None else self.moe(hidden)
        return x + tap("mlp/out", out)

    def __call__(self, x: Float[Array, "B T D"], mix: Mix) -> tuple[Float[Array, "B T D"], Any]:
        x, state = self.attend_half(x, mix)
        return self.mlp_half(x), state


class Embedding(nn.Module):
    """Declares `embedding` [V D]; a lookup. With learned positions also `positions` [P D], which is added."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        init, dtype = nn.initializers.normal(c.init_std), jnp.dtype(c.param_dtype)
        table = self.param("embedding", init, (c.vocab, c.width), dtype)
        x = jnp.take(table, tokens, axis=0).astype(jnp.dtype(c.dtype))
        if c.learned_positions:
            table = self.param("positions", init, (c.positions, c.width), dtype)
            # Padding may lie beyond the table.
            x += jnp.take(table, positions, axis=0, mode="clip").astype(x.dtype)
        return x


class Head(nn.Module):
    """The last norm and the projection to the vocabulary: its own `lm_head`, or the embedding where tied."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], table: Float[Array, "V D"] | None, tap: Tap = _pass
    ) -> Float[Array, "B T V"]:
        x = tap("final", Norm(self.config, self.config.norm, name="norm")(x))
        c = self.config
        matrix = _matrix(self, c, "lm_head", (c.vocab, c.width)) if table is None else table
        return _token_dot(x, matrix, axis=1)


class Decoder(nn.Module):
    """All parts under their names: declares every parameter of a model (`jaxfw.models.init`), bridges to NNX.

    `router` has the `init` of a `jaxfw.models.routing.Router`; needed for layers with experts.
    """

    config: DecoderConfig
    router: Any = None

    def setup(self):
        moe = self.config.moe
        self.embed = Embedding(self.config)
        self.layers = [
            Block(self.config, self.router if moe and moe.is_in(i) else None) for i in range(self.config.layers)
        ]
        self.head = Head(self.config)

    def __call__(self, tokens: Int[Array, "B T"], mix: Mix) -> Float[Array, "B T V"]:
        """Logits of the plain forward, without a cache; `mix` as for `Attention`."""
        x = self.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        for block in self.layers:
            x, _ = block(x, mix)
        return self.head(x, self.embed.variables["params"]["embedding"] if self.config.tie_embeddings else None)
