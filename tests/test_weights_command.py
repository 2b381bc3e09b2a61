"""The command line of model directories: what it prints, what it finds, its exit codes and one-line errors."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxfw.models import init
from jaxfw.weights import load, save
from jaxfw.weights.__main__ import main
from tests.model_directories import CONFIG, DOWN, equal, rewrite, set_attributes


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "model", CONFIG, init(CONFIG, jax.random.key(0)), extra={"tokenizer.json": "{}"})


def said(capsys, *words):
    """Exit code, and what was printed."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out + err


# --- inspect


def test_inspect(saved, capsys):
    code, out = said(capsys, "inspect", saved)
    assert code == 0
    for part in ("family      llama", "width=16", "parameters  6,640", "bytes       26,560 in memory, in 1 file(s)"):
        assert part in out
    assert re.search(rf"{re.escape(DOWN)} +16x24 +F32 +layers_0/mlp/down/kernel", out)
    assert "loads       yes" in out and "missing" not in out


def test_inspect_says_what_keeps_it_from_loading_and_fails(saved, capsys):
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite(
        saved, lambda t: {k: v for k, v in t.items() if k != DOWN} | {"odd": t[DOWN], buffer: np.ones(4, np.float32)}
    )
    code, out = said(capsys, "inspect", saved)
    assert code == 1 and f"loads       no: missing: {DOWN}; unexpected: odd" in out
    assert f"missing (1):\n  {DOWN}" in out and "unexpected (1):\n  odd" in out and f"ignored (1):\n  {buffer}" in out


def test_inspect_shows_a_mesh(saved, capsys):
    whole, cut = (said(capsys, "inspect", saved, f"--mesh={sizes}")[1].splitlines()[-1] for sizes in ("", "tensor=2"))
    assert whole.split()[-2:] == ["26,560", "26,560"]
    assert int(cut.split()[-1].replace(",", "")) < 0.6 * 26560
    assert "quantised to int4" in said(capsys, "inspect", saved, "--quantise=int4")[1]


# --- verify


def test_verify(saved, capsys):
    code, out = said(capsys, "verify", saved, "--write")
    assert code == 0 and "FAILED" not in out and "no SHA256SUMS (--write makes one)" in out
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=True)
    assert found.stdout.count("OK") == 3
    code, out = said(capsys, "verify", saved)
    assert code == 0 and "ok     model.safetensors" in out


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "tokenizer.json").write_text("{ }"), "FAILED tokenizer.json: has sha256"),
        (lambda d: (d / "tokenizer.json").unlink(), "FAILED tokenizer.json: is missing, but SHA256SUMS names it"),
        (lambda d: (d / "SHA256SUMS").write_text("oh"), "FAILED SHA256SUMS: has a line that is no sum and name: oh"),
        (
            lambda d: rewrite(d, lambda t: t | {DOWN: np.full((16, 24), np.nan, np.float32)}),
            f"FAILED {DOWN}: holds NaN or infinite numbers",
        ),
        (lambda d: rewrite(d, lambda t: {DOWN: t[DOWN]}), "FAILED tensors of config.json: missing: lm_head.weight"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
            "truncated or corrupt",
        ),
    ],
)
def test_verify_finds(saved, capsys, damage, message):
    assert said(capsys, "verify", saved, "--write")[0] == 0
    damage(saved)
    code, out = said(capsys, "verify", saved)
    assert code == 1 and message in out


def test_verify_finds_what_an_index_leaves_out(tmp_path, capsys):
    directory = save(tmp_path / "a", CONFIG, init(CONFIG, jax.random.key(0)), shard_bytes=4096)
    (directory / "model-00099-of-00099.safetensors").write_bytes(b"")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += 1
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out = said(capsys, "verify", directory)
    assert code == 1
    assert "FAILED model.safetensors.index.json: does not name model-00099-of-00099.safetensors" in out
    assert "FAILED total_size: is 26,561 in the index, the tensors have 26,560 bytes" in out


# --- export


def test_export(saved, tmp_path, capsys):
    set_attributes(saved, eos_token_id=[5])
    code, out = said(capsys, "export", saved, tmp_path / "out", "--param-dtype=bfloat16", "--shard-bytes=4096")
    assert code == 0 and f"written: {tmp_path / 'out'}" in out
    read, expected = load(tmp_path / "out"), load(saved, param_dtype="bfloat16")
    assert equal(read.params, expected.params) and read.attributes["eos_token_id"] == [5]
    assert read.attributes["dtype"] == "bfloat16" and (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_export_of_a_workdir(saved, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text('{"experiment": "experiments.quickstart"}')
    (workdir / "results.json").write_text("{}")
    code, out = said(capsys, "export", workdir, tmp_path / "out")
    assert code == 2 and "is a workdir without a model folder" in out
    saved.rename(workdir / "model")
    assert said(capsys, "export", workdir, tmp_path / "out")[0] == 0
    (ours, theirs) = (load_file(d / "model.safetensors") for d in (tmp_path / "out", workdir / "model"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


# --- what cannot be used


@pytest.mark.parametrize(
    "words, message",
    [
        (["inspct", "x"], "invalid choice: 'inspct'"),
        (["inspect"], "the following arguments are required: directory"),
        (["inspect", "absent"], "absent is not a directory"),
        (["inspect", "DIR", "--mesh=tensr=2"], "mesh axis='tensr' is unknown. Known: data, fsdp"),
        (["inspect", "DIR", "--quantise=int5"], "quantise='int5' is unknown. Known: int8, int4"),
        (["verify", "absent"], "absent is not a directory"),
        (["verify", "DIR", "--wirte"], "unrecognized arguments: --wirte"),
        (["export", "DIR"], "the following arguments are required: target"),
        (["export", "DIR", "DIR"], "exists and is not empty: give a new directory"),
        (["export", "DIR", "new", "--shard-bytes=5GB"], "--shard-bytes='5GB' must be a whole number of bytes"),
        (["export", "DIR", "new", "--param-dtype=int8"], "param_dtype='int8' is unknown. Known: float32"),
    ],
)
def test_what_cannot_be_used(saved, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out = said(capsys, *(str(saved) if word == "DIR" else word for word in words))
    assert code == 2 and message in out and out.startswith("error: ") and out.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_as_a_module(saved):
    found = subprocess.run([sys.executable, "-m", "jaxfw.weights", "inspect", saved], capture_output=True, text=True)
    assert found.returncode == 0 and "family      llama" in found.stdout
    found = subprocess.run([sys.executable, "-m", "jaxfw.weights"], capture_output=True, text=True)
    assert found.returncode == 2 and "python -m jaxfw.weights inspect DIR" in found.stdout
