"""Text and batches: what a model reads.

`tokenizer` turns text into token ids and back, `chat` turns a conversation into text, `text` is at hand on every
machine, `batches` cuts windows of tokens.
"""

from jaxfw.data.batches import RandomWindows, consecutive_windows
from jaxfw.data.text import stdlib_docstrings
from jaxfw.data.tokenizer import TextStream, Tokenizer, load_tokenizer, save_tokenizer, train_bpe

__all__ = [
    "RandomWindows", "TextStream", "Tokenizer", "consecutive_windows", "load_tokenizer", "save_tokenizer",
    "stdlib_docstrings", "train_bpe",
]  # fmt: skip
