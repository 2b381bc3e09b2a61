"""Text from a model: the engine on token ids, and `LM`, a model with its tokenizer."""

from jaxfw.generate.engine import Generation, bucket, decode, generate, prefill
from jaxfw.generate.lm import LM, load

__all__ = ["LM", "Generation", "bucket", "decode", "generate", "load", "prefill"]
