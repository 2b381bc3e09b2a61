"""The GPU run goes through on tiny shapes anywhere, part by part, and claims nothing where there is no GPU."""

import json
import subprocess
import sys

import jax
import pytest

from experiments.gpu import __main__ as gpu
from experiments.gpu import parts
from jaxfw.core import aot

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))


@needs_compiler
@pytest.mark.parametrize("name", parts.PARTS)
def test_every_part_is_reached(name, tmp_path):
    """In this process, by the function that a part's own process calls."""
    out = tmp_path / "found.json"
    assert gpu.run_part(name, smoke=True, out=out) == 0
    found = json.loads(out.read_text())
    assert found["environment"]["versions"]["jax"] and found.get("ok", True)
    if name.startswith(("training", "generation")):
        assert found["parameters"] > 0 and 0 < found["predicted_seconds"] < 1
    if name == "decode_attention_speed":
        assert found["llama-3.1-8b/8x32768"]["faster_than_xla"] > 0


def test_one_call_runs_processes_prints_a_table_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "gpu")
    assert gpu.main(["--smoke", "--only=decode_attention"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ok     decode_attention ") and "1 of 1 parts are fine" in said
    assert not list(tmp_path.iterdir())


def test_what_fails_or_hangs_costs_only_itself(capsys, monkeypatch, tmp_path):
    """A part that raises, one that is stopped, and the one behind them, whose result survives."""
    lines = {
        "forward": "raise RuntimeError('out of memory')",
        "decoding": "import time; time.sleep(60)",
        "training": "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'mfu': 0.5}))",
    }
    real = subprocess.run

    def run(command, **options):
        part = next((word.removeprefix("--part=") for word in command if word.startswith("--part=")), None)
        if part is None:
            return real([sys.executable, "-c", "print('gpu')"], **options)
        out = next(word.removeprefix("--out=") for word in command if word.startswith("--out="))
        return real([sys.executable, "-c", lines[part], out], **options)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setitem(parts.PARTS, "decoding", (parts.PARTS["decoding"][0], 1))
    assert gpu.main(["--only=forward,decoding,training"]) == 1
    said = capsys.readouterr().out
    assert "FAILED forward" in said and "RuntimeError: out of memory" in said
    assert "FAILED decoding" in said and "stopped after its 1 seconds" in said
    assert "ok     training" in said and "mfu 0.5" in said and "1 of 3 parts are fine" in said
    assert json.loads((tmp_path / "training.json").read_text())["ok"]
    assert not json.loads((tmp_path / "forward.json").read_text())["ok"]


def test_all_parts_fit_into_nine_minutes():
    assert sum(limit for _, limit in parts.PARTS.values()) <= 520


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no GPU here, jax sees 'cpu'" in capsys.readouterr().err
    assert gpu.main(["--only=dance"]) == 2
    assert "--only='dance' is unknown" in capsys.readouterr().err


def test_it_needs_neither_ml_collections_nor_datasets():
    code = (
        "import sys; sys.modules['ml_collections'] = sys.modules['datasets'] = None; "
        "import experiments.gpu.parts, experiments.gpu.__main__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
