"""The GPU run goes through on tiny shapes anywhere, and claims nothing where there is no GPU."""

import json

import jax
import pytest

from experiments import gpu


def test_its_parts_run_on_tiny_shapes_and_write_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "core.json")
    assert gpu.main(["--smoke"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert json.loads(lines["forward equals the CPU's"])["ok"]
    assert json.loads(lines["decoding equals whole forwards"])["ok"]
    assert json.loads(lines["decode_attention equals its reference"])["ok"]
    assert json.loads(lines["decode_attention"])["llama-3.1-8b/8x32768"]["faster_than_xla"] > 0
    assert json.loads(lines["training step"])["tokens_per_second"] > 0
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_costs_only_itself(capsys, monkeypatch):
    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "check_forward", broken)
    assert gpu.main(["--smoke"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: out of memory" in out and "training step: {" in out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no GPU here, jax sees 'cpu'" in capsys.readouterr().err
