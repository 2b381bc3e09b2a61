"""The model that comes with jaxfw in transformers: the same files, the same logits, the same answers."""

import numpy as np
import pytest

import jaxfw
from jaxfw.evals import TASKS, items
from jaxfw.weights.shipped import located

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DIRECTORY = located("embedded-1")


@pytest.fixture(scope="module")
def both():
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY)
    return jaxfw.load("embedded-1"), theirs.eval(), transformers.AutoTokenizer.from_pretrained(DIRECTORY)


def test_it_loads_in_float32_with_the_same_tokens(both):
    m, theirs, tokenizer = both
    assert theirs.dtype == torch.float32
    text = items(TASKS["code"], n=1, level=4, seed=0)[0].prompt
    assert tokenizer(text)["input_ids"] == m.tokenizer.encode(text)
    messages = [{"role": "user", "content": "214 + 473"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == m.tokenizer.render_chat(messages)


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_the_same(both, name):
    m, theirs, tokenizer = both
    task = TASKS[name]
    prompts = [item.prompt for item in items(task, n=6, level=task.standard, seed=0)]
    for prompt, answer in zip(prompts, m.generate(prompts, max_new_tokens=40), strict=True):
        ids = torch.tensor([m.tokenizer.encode(prompt)])
        with torch.no_grad():
            logits = theirs(ids).logits[0].numpy()
            made = theirs.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        ours = np.asarray(jaxfw.forward(m.config, m.params, ids.numpy()).logits[0])
        assert np.abs(ours - logits).max() <= 1e-4 * max(1.0, logits.std())
        assert tokenizer.decode(made, skip_special_tokens=True) == answer
