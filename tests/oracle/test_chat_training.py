"""Which tokens are the assistant's: as transformers' `return_assistant_tokens_mask` says, where templates mark them."""

import dataclasses

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from jaxfw.data import encode_chat, load_tokenizer  # noqa: E402
from tests.oracle.test_tokenizer import LLAMA3, SENTENCEPIECE, llama2, llama3, write  # noqa: E402

MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CONVERSATIONS = [
    [{"role": role, "content": content} for role, content in turns]
    for turns in (
        [("user", "hello world"), ("assistant", "The quick brown fox")],
        [
            ("system", "def"),
            ("user", "a"),
            ("assistant", "  two\n\n    spaces "),
            ("user", "123"),
            ("assistant", "é x"),
        ],
        [("user", "a"), ("assistant", ""), ("user", "naïve façade"), ("assistant", "hello\n"), ("user", "bye")],
        [("user", "no answer")],
    )
]
CASES = {"llama3": (llama3, LLAMA3), "llama2": (llama2, SENTENCEPIECE)}


@pytest.mark.parametrize("make, config", CASES.values(), ids=CASES)
def test_the_same_tokens_are_trained_on(tmp_path, make, config):
    directory = write(tmp_path / "model", make(), config | {"chat_template": MARKED})
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    by_prefixes = dataclasses.replace(ours, chat_templates={"default": UNMARKED})
    for messages in CONVERSATIONS:
        wanted = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for tokenizer in (ours, by_prefixes):
            tokens, weights = encode_chat(tokenizer, messages)
            assert list(tokens) == wanted["input_ids"]
            np.testing.assert_array_equal(weights, wanted["assistant_masks"])
