"""The same requests through lm-eval's own `hf` backend and through ours: log-likelihoods, strings, chat."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxfw
from jaxfw.data import stdlib_docstrings, train_bpe
from jaxfw.generate import LM
from jaxfw.models import DecoderConfig, init

pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.evals.harness import HarnessLM  # noqa: E402

CONFIG = DecoderConfig(
    vocab=400, width=48, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=12, positions=192, init_std=0.3
)
TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\n"
              "doc_to_text: 'Question: {{text}}\\nAnswer:'\nnum_fewshot: 2\nfewshot_split: test\n"
              "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "write": "output_type: generate_until\ndoc_to_text: 'Say: {{text}}'\ndoc_to_target: '{{answer}}'\n"
             "generation_kwargs: {until: ['e', '\\n\\n'], max_gen_toks: 12, do_sample: false}\n"
             "metric_list: [{metric: exact_match}]\n",
    "read": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{long}}'\n"
            "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tokenizer = train_bpe(stdlib_docstrings(most=40), vocab_size=400)
    params = jax.jit(lambda: init(CONFIG, jax.random.key(0)))()
    return LM(CONFIG, params, tokenizer, (tokenizer.eos_id,)).save(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = stdlib_docstrings(most=60)[:24]
    docs = [
        {"text": text[:60], "long": text[:1500], "answer": text[60:70],
         "choices": [text[60:66] or "x", "other things", "a", "i"], "label": i % 4}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    for name, described in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/docs.json}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{described}")
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def backends(directory):
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)
    return HarnessLM(str(directory), batch_size=4), theirs


def responses(backend, manager, task, **options):
    found = lm_eval.simple_evaluate(
        model=backend, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples], found["results"][task]


@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_as_likely_to_both(backends, manager, chat):
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "limit": 12}
    (ours, scored), (theirs, expected) = (responses(backend, manager, "choose", **options) for backend in backends)
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    assert len(pairs) == 48
    for ((mine, greedy),), ((other, greedily),) in pairs:
        assert float(mine) == pytest.approx(float(other), abs=1e-4) and greedy == greedily
    assert scored["acc,none"] == expected["acc,none"] and scored["acc_norm,none"] == expected["acc_norm,none"]


def test_long_texts_have_the_same_perplexity(backends, manager):
    (ours, scored), (theirs, expected) = (responses(backend, manager, "read") for backend in backends)
    np.testing.assert_allclose(np.array(ours, float).ravel(), np.array(theirs, float).ravel(), rtol=1e-5, atol=1e-4)
    assert scored["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte,none"], rel=1e-6)


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_written_is_the_same_up_to_the_stop(backends, manager, chat):
    (ours, _), (theirs, _) = (responses(backend, manager, "write", apply_chat_template=chat) for backend in backends)
    assert ours == theirs
    texts = [text for ((text,),) in ours]
    assert len({*texts}) > 12 and all("e" not in text for text in texts), texts


def test_token_ids_are_continued_as_they_are(backends):
    assert backends[0].lm.generate_from([[5, 6, 7]], max_new_tokens=4) == [
        backends[0].lm.tokenizer.decode(jaxfw_tokens(backends[0].lm, [5, 6, 7]))
    ]


def jaxfw_tokens(lm, ids):
    return jaxfw.generate_tokens(lm.config, lm.params, [ids], max_new_tokens=4, stop_ids=lm.stop_ids).tokens[0]


def test_the_command_line_is_that_of_the_harness(directory, folder, tmp_path):
    words = ["run", "--model", "jaxfw", "--model_args", f"pretrained={directory}", "--tasks", "choose", "--limit", "3",
             "--include_path", str(folder), "--output_path", str(tmp_path / "out.json")]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "jaxfw.evals.harness", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.rglob("*.json")
    assert 0 <= json.loads(written.read_text())["results"]["choose"]["acc,none"] <= 1


@pytest.mark.parametrize(
    "options, message",
    [({"batch_size": "auto"}, "batch_size='auto'"), ({"batch_size": 0}, "batch_size=0"), ({"colour": 1}, "colour")],
)
def test_what_cannot_be_used_is_named(directory, options, message):
    with pytest.raises(InputError, match=message):
        HarnessLM(str(directory), **options)


def test_a_generation_without_room_for_its_prompt_is_named(backends):
    with pytest.raises(InputError, match="max_gen_toks=192 leaves no room"):
        backends[0]._prompt("text", 192)


def test_the_benchmark_compares_before_it_times():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.harness", "--smoke"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if " ratio " in line] == [
        "loglikelihood", "loglikelihood_rolling", "generate_until",
    ]  # fmt: skip
