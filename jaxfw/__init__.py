"""jaxfw: a research framework for large language models on scarce hardware, in JAX.

    import jax, jaxfw

    m = jaxfw.load("DIR")                                  # a Hugging Face directory: config, parameters, tokenizer
    m.generate("Once upon a time", max_new_tokens=32)      # -> str; a list gives a list
    m.chat([{"role": "user", "content": "Who are you?"}], temperature=0.7, key=jax.random.key(1))
    m.logprobs("A sentence.")                              # -> float32 array, one entry a token
    m.save("NEW")                                          # what transformers reads

    tokens = jax.numpy.array([m.tokenizer.encode("The model is pure functions beneath.")])
    jaxfw.forward(m.config, m.params, tokens).logits       # whole, or by parts: embed, layer, head
    jaxfw.init(m.config, jax.random.key(0))                # fresh parameters: nested dicts of arrays
    jaxfw.generate_tokens(m.config, m.params, [[1, 2, 3]], max_new_tokens=8).tokens

The packages: `core` (errors, configuration, workdir), `ops` (pure mathematics), `nn` and `models` (the decoder and its
caches), `weights` (Hugging Face directories), `data`, `generate`, `train`, `report`. Names here are loaded when they
are first used; the import itself is quick and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxfw.generate.engine import generate as generate_tokens
    from jaxfw.generate.lm import LM, load
    from jaxfw.models import DecoderConfig, embed, forward, head, init, layer

    __version__: str

__all__ = [
    "LM",
    "DecoderConfig",
    "__version__",
    "embed",
    "forward",
    "generate_tokens",
    "head",
    "init",
    "layer",
    "load",
]

_HOMES = {
    **dict.fromkeys(("LM", "load"), "jaxfw.generate.lm"),
    **dict.fromkeys(("DecoderConfig", "embed", "forward", "head", "init", "layer"), "jaxfw.models"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version("jaxfw")
    elif name == "generate_tokens":  # `jaxfw.generate` is the package
        from jaxfw.generate.engine import generate as value
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'jaxfw' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
