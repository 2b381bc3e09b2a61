"""The parts of a decoder as Linen shells: embedding, attention projections, feed-forward, block, head."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxfw.core.shapes import Array, Float, Int
from jaxfw.nn.config import DecoderConfig
from jaxfw.ops.norms import rms_norm

# (q [B T H d], k [B T K d], v [B T K d], hidden [B T D], w_o [H*d D]) -> (heads [B T H d], anything)
Mix = Callable[..., tuple[Array, Any]]
# (site, value) -> value: shows a value under its name in the site table, and goes on with what comes back
Tap = Callable[[str, Array], Array]


def _pass(site: str, x: Array) -> Array:
    return x


class RMSNorm(nn.Module):
    """Declares `scale` [D] and normalises the last axis."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.config.param_dtype))
        return rms_norm(x, scale, eps=self.config.norm_eps)


def _token_dot(x: Float[Array, "B T D"], kernel: Array, dimension_numbers, **options) -> Array:
    """`lax.dot_general` of x's last axis, as one product of two matrices: [B*T D] with the kernel.

    With B and T apart, XLA's CPU backend transposes and copies activations for every kernel's gradient (a feed-forward
    takes half as long again). Not on a mesh of several devices: there B and T may be sharded over different axes,
    and merging them would move every activation between devices.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    (_, contracting), batch = dimension_numbers
    out = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), contracting), batch), **options)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _dense(config: DecoderConfig, features: int, use_bias: bool) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.initializers.normal(config.init_std),
        dot_general=_token_dot,
    )


class Attention(nn.Module):
    """Declares the four projections; how queries meet keys is `mix`, given by the caller."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.q = _dense(c, c.heads * c.head_dim, c.qkv_bias)
        self.k = _dense(c, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v = _dense(c, c.kv_heads * c.head_dim, c.qkv_bias)
        self.o = _dense(c, c.width, c.out_bias)

    def __call__(self, hidden: Float[Array, "B T D"], mix: Mix) -> tuple[Float[Array, "B T D"], Any]:
        B, T, _ = hidden.shape
        c = self.config
        q = self.q(hidden).reshape(B, T, c.heads, c.head_dim)
        k = self.k(hidden).reshape(B, T, c.kv_heads, c.head_dim)
        v = self.v(hidden).reshape(B, T, c.kv_heads, c.head_dim)
        w_o = None if self.is_initializing() else self.o.variables["params"]["kernel"]
        heads, state = mix(q, k, v, hidden, w_o)
        return self.o(heads.reshape(B, T, c.heads * c.head_dim)), state


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.gate = _dense(c, c.ffn, c.mlp_bias)
        self.up = _dense(c, c.ffn, c.mlp_bias)
        self.down = _dense(c, c.width, c.mlp_bias)

    def __call__(self, x: Float[Array, "B T D"], tap: Tap = _pass) -> Float[Array, "B T D"]:
        # Gradients recompute the product: kept, its factors would double what a layer holds of [B T F].
        gated = jax.checkpoint(lambda gate, up: nn.silu(gate) * up)
        return self.down(tap("mlp/key", gated(self.gate(x), self.up(x))))


class MoE(nn.Module):
    """Declares `router`, as the router's own `init` makes it, and `experts`: gate, up [E D F] and down [E F D].

    What they compute is `jaxfw.models.routing`'s: called only to be initialised.
    """

    config: DecoderConfig
    router: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, moe = self.config, self.config.moe
        assert moe is not None
        dtype, D, E, F = jnp.dtype(c.param_dtype), c.width, moe.experts, moe.ffn
        self.param("router", lambda key: self.router.init(key, D, E, std=c.init_std, dtype=dtype))
        shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}

        def init_experts(key):
            keys = jax.random.split(key, len(shapes))
            draw = nn.initializers.normal(c.init_std)
            return {name: draw(k, shape, dtype) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

        self.param("experts", init_experts)
        return x


class Block(nn.Module):
    """One layer: attention and feed-forward (or, with a `router`, experts), behind norms, added to the residual."""

    config: DecoderConfig
    router: Any = None

    def setup(self):
        self.attn_norm = RMSNorm(self.config)
        self.attn = Attention(self.config)
        self.mlp_norm = RMSNorm(self.config)
        if self.router is None:
            self.mlp = GatedMLP(self.config)
        else:
            self.moe = MoE(self.config, self.router)

    def attend_half(self, x: Float[Array, "B T D"], mix: Mix, tap: Tap = _pass) -> tuple[Float[Array, "B T D"], Any]:
        """The residual after attention, and what `mix` returned beside the heads."""
        out, state = self.attn(tap("attn/in", self.attn_norm(x)), mix)
        return x + tap("attn/out", out), state

    def mlp_input(self, x: Float[Array, "B T D"], tap: Tap = _pass) -> Float[Array, "B T D"]:
        """The normalised residual that the feed-forward part, or router and experts, read."""
        return tap("mlp/in", self.mlp_norm(x))

    def mlp_half(self, x: Float[Array, "B T D"], tap: Tap = _pass) -> Float[Array, "B T D"]:
        """The residual after the feed-forward part."""
        hidden = self.mlp_input(x, tap)
        out = self.mlp(hidden, tap) if self.router is None else self.moe(hidden)
        return x + tap("mlp/out", out)

    def __call__(self, x: Float[Array, "B T D"], mix: Mix) -> tuple[Float[Array, "B T D"], Any]:
        x, state = self.attend_half(x, mix)
        return self.mlp_half(x), state


class Embedding(nn.Module):
    """Declares `embedding` [V D]; a lookup."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        shape = (c.vocab, c.width)
        table = self.param("embedding", nn.initializers.normal(c.init_std), shape, jnp.dtype(c.param_dtype))
        return jnp.take(table, tokens, axis=0).astype(jnp.dtype(c.dtype))


class Head(nn.Module):
    """The last norm and the projection to the vocabulary: its own `lm_head`, or the embedding where tied."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], table: Float[Array, "V D"] | None, tap: Tap = _pass
    ) -> Float[Array, "B T V"]:
        x = tap("final", RMSNorm(self.config, name="norm")(x))
        if table is None:
            c = self.config
            init = nn.initializers.normal(c.init_std)
            table = self.param("lm_head", init, (c.vocab, c.width), jnp.dtype(c.param_dtype))
        return _token_dot(x, table.astype(x.dtype), (((2,), (1,)), ((), ())))


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
        x = self.embed(tokens)
        for block in self.layers:
            x, _ = block(x, mix)
        return self.head(x, self.embed.variables["params"]["embedding"] if self.config.tie_embeddings else None)
