"""Text and batches: what a model reads.

`tokenizer` turns text into token ids and back, `chat` turns a conversation into text, `text` is at hand on every
machine. A `Corpus` holds the tokens of documents; `batches` and `packing` make batches of it that are functions of the
step, and `prefetch` makes them ahead.
"""

from jaxfw.data.batches import Batches, RandomWindows, Windows, consecutive_windows
from jaxfw.data.corpus import Corpus, Document
from jaxfw.data.packing import Packed
from jaxfw.data.prefetch import Prefetch
from jaxfw.data.text import stdlib_docstrings
from jaxfw.data.tokenizer import TextStream, Tokenizer, load_tokenizer, save_tokenizer, train_bpe

__all__ = [
    "Batches", "Corpus", "Document", "Packed", "Prefetch", "RandomWindows", "TextStream", "Tokenizer", "Windows",
    "consecutive_windows", "load_tokenizer", "save_tokenizer", "stdlib_docstrings", "train_bpe",
]  # fmt: skip
