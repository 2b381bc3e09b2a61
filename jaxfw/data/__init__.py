"""Text and batches: what a model reads.

`tokenizer` turns text into token ids and back, `chat` turns a conversation into text and `turns` says which of its
tokens to train on; `text` is at hand on every machine. `documents` are read from files and made into a `Corpus` of
tokens by `encoding`, in memory or as a `token_file`. `batches`, `packing`, `procedural` and `mixture` make batches that
are functions of the step, and `prefetch` makes them ahead.
"""

from jaxfw.data.batches import Batches, RandomWindows, Windows, consecutive_windows
from jaxfw.data.corpus import Corpus, Document
from jaxfw.data.documents import Documents, find_documents
from jaxfw.data.encoding import encode_documents, prepare, read_corpus, vocabulary_fingerprint
from jaxfw.data.mixture import Mixture
from jaxfw.data.packing import Packed
from jaxfw.data.prefetch import Prefetch
from jaxfw.data.procedural import Procedural, Recall, Repeated
from jaxfw.data.text import stdlib_docstrings
from jaxfw.data.token_file import open_tokens, verify_tokens, write_tokens
from jaxfw.data.tokenizer import TextStream, Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from jaxfw.data.turns import encode_chat

__all__ = [
    "Batches", "Corpus", "Document", "Documents", "Mixture", "Packed", "Prefetch", "Procedural", "RandomWindows",
    "Recall", "Repeated", "TextStream", "Tokenizer", "Windows", "consecutive_windows", "encode_chat",
    "encode_documents", "find_documents", "load_tokenizer", "open_tokens", "prepare", "read_corpus", "save_tokenizer",
    "stdlib_docstrings", "train_bpe", "verify_tokens", "vocabulary_fingerprint", "write_tokens",
]  # fmt: skip
