"""Text from a model: the engine on token ids, and `LM`, a model with its tokenizer.

python -m jaxfw.generate --model=DIR --prompt="Once upon a time"
"""

from jaxfw.generate.engine import Generation, bucket, decode, extend, generate, prefill
from jaxfw.generate.lm import LM, load
from jaxfw.generate.options import Answer, ModelValues
from jaxfw.generate.prefix import Prefix, read_prefix

__all__ = [
    "LM", "Answer", "Generation", "ModelValues", "Prefix", "bucket", "decode", "extend", "generate", "load", "prefill",
    "read_prefix",
]  # fmt: skip
