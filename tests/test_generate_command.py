"""`python -m jaxfw.generate`: what it prints, and what it says of wrong input."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import jax
import pytest

import jaxfw
from jaxfw.data import train_bpe
from jaxfw.generate import LM
from jaxfw.generate.__main__ import main
from jaxfw.models import DecoderConfig, init

CONFIG = DecoderConfig(
    vocab=300, width=16, ffn=32, layers=1, heads=2, kv_heads=1, head_dim=8, positions=96, init_std=0.5
)
NEW = "--max-new-tokens=12"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)
    tokenizer = train_bpe(["Once upon a time there was a list.\n\n" * 9, "What is a tuple? é"], vocab_size=300)
    generation = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1}
    params = jax.jit(init, static_argnums=0)(CONFIG, jax.random.key(0))
    lm = LM(CONFIG, params, tokenizer, (tokenizer.eos_id or 0,), generation=generation)
    yield lm.save(tmp_path_factory.mktemp("command") / "model")
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def lm(model):
    return jaxfw.load(model)


@pytest.fixture
def command(model, capsys, monkeypatch):
    """Runs it in this process; returns exit code, stdout, stderr."""
    monkeypatch.setattr("jaxfw.core.runtime.enable_compilation_cache", lambda: None)

    def run(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main([f"--model={model}", *words])
        return code, *capsys.readouterr()

    return run


def test_one_text_is_streamed_in_a_process_of_its_own(model, lm):
    # jax's CUDA plugin, installed beside it to compile without a GPU, reports that there is none.
    environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "PYTHONIOENCODING": "utf-8"}
    words = [sys.executable, "-m", "jaxfw.generate", f"--model={model}", "--prompt=Once upon", NEW]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == lm.generate("Once upon", max_new_tokens=12) + "\n"


def test_a_prompt_from_stdin_with_a_stop_string(command, lm):
    text = lm.generate("Once upon", max_new_tokens=12)
    code, out, _ = command("--prompt=-", NEW, f"--stop={text[3:5]}", stdin="Once upon")
    assert (code, out) == (0, text.partition(text[3:5])[0] + "\n")


def test_json_has_a_line_for_each_text(command, lm):
    options = ["--prompt=Once", "--prompt=é", "--n=2", "--temperature=0.9", "--top-k=50", "--seed=3", NEW, "--json"]
    code, out, _ = command(*options)
    drawn = {"n": 2, "temperature": 0.9, "top_k": 50, "key": jax.random.key(3), "max_new_tokens": 12, "details": True}
    expected = [one for samples in lm.generate(["Once", "é"], **drawn) for one in samples]
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["text"] for line in lines] == [one.text for one in expected]
    assert [(line["prompt"], line["sample"]) for line in lines] == [("Once", 0), ("Once", 1), ("é", 0), ("é", 1)]
    for line, one in zip(lines, expected, strict=True):
        assert (line["tokens"], line["finish_reason"]) == (list(one.tokens), one.finish_reason)
        assert line["logprobs"] == pytest.approx(one.logprobs.tolist(), abs=1e-6)
        assert line["prefill_seconds"] > 0 and line["decode_seconds"] > 0


def test_several_texts_are_printed_apart(command, lm):
    texts = lm.generate(["Once", "What"], max_new_tokens=12)
    _, out, _ = command("--prompt=Once", "--prompt=What", NEW)
    assert out == f"--- prompt 1\n{texts[0]}\n--- prompt 2\n{texts[1]}\n"


def test_chat_with_a_systems_message(command, lm):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is a tuple?"}]
    code, out, _ = command("--prompt=What is a tuple?", "--chat", "--system=Be short.", NEW)
    assert (code, out) == (0, lm.chat(messages, max_new_tokens=12) + "\n")


def test_suggested_is_followed_where_no_flag_speaks(command, lm):
    drawn = lm.suggested | {"temperature": 1.3, "key": jax.random.key(0), "max_new_tokens": 12}
    assert lm.suggested == {"temperature": 0.7, "repetition_penalty": 1.1}
    _, out, _ = command("--prompt=Once", "--suggested", "--temperature=1.3", NEW)
    assert out == lm.generate("Once", **drawn) + "\n"


def test_quantised_and_on_a_mesh(command):
    code, out, _ = command("--prompt=Once", "--quantise=int8", "--mesh=data=1", "--dtype=float32", "--max-new-tokens=3")
    assert code == 0 and out.endswith("\n")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--prompt is missing: give a text, or --prompt=-"]),
        (["--promt=a"], ["flag='--promt' is unknown", "Did you mean '--prompt'?"]),
        (["--prompt=a", "--system=b"], ["--system is given without --chat"]),
        (["--prompt=a", "--seed=-1"], ["--seed=-1 must be 0 or more"]),
        (["--prompt=-", "--prompt=-"], ["--prompt=- is given twice"]),
        (["--prompt=a", "--n=two"], ["argument --n: invalid int value: 'two'", "See --help"]),
        (["--prompt=a", "--n=0"], ["n=0 must be at least 1"]),
        (["--prompt=a", "--top-p=0.9"], ["give temperature as well"]),
        (["--prompt=a", "--max-new-tokens=0"], ["max_new_tokens=0 must be at least 1"]),
        (["--prompt=a", "--mesh=tensr=2"], ["mesh axis='tensr' is unknown", "tensor"]),
        (["--prompt=a", "--mesh=tensor=64"], ["mesh tensor=64 needs 64 devices"]),
        (["--prompt=a", "--dtype=int8"], ["int8", "float32"]),
        (["--prompt=a", "--quantise=int3"], ["int3", "int8"]),
        (["--prompt=a", "--stop="], ["holds an empty text"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(command, words, parts):
    code, out, err = command(*words)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in err.splitlines()[-1]


def test_a_model_that_is_not_there(command, capsys):
    assert main(["--prompt=a"]) == 2 and "--model is missing" in capsys.readouterr().err
    assert main(["--model=nowhere", "--prompt=a", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "error: nowhere is not a directory" in err


def test_a_run_that_fails_is_exit_code_1(command, lm, tmp_path, capsys):
    spoilt = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * float("nan"), lm.params))
    assert main([f"--model={spoilt.save(tmp_path / 'spoilt')}", "--prompt=a", "--max-new-tokens=2"]) == 1
    assert "error: the model's logits are NaN or infinite" in capsys.readouterr().err
