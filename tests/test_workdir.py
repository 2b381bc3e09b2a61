"""Workdirs: one owner at a time, one configuration, files that are whole, metrics without gaps or repeats."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core import log, runtime
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import InputError
from jaxfw.core.log import Metrics
from jaxfw.core.workdir import claim, open_workdir, write_json

ROOT = Path(__file__).parents[1]


def test_two_owners_at_once_are_refused(tmp_path):
    with (
        open_workdir(tmp_path / "run"),
        pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on .*give another"),
        open_workdir(tmp_path / "run"),
    ):
        pass
    with open_workdir(tmp_path / "run"):
        pass


def test_the_lock_goes_with_its_process(tmp_path):
    code = f"""
import time
from jaxfw.core.workdir import open_workdir
with open_workdir({str(tmp_path)!r}):
    print("locked", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"in use by process {owner.pid}"), open_workdir(tmp_path):
            pass
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with open_workdir(tmp_path):
        pass


def test_a_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot be written.*give another folder"), open_workdir(tmp_path / "file"):
        pass


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path):
    claim(tmp_path, {"lr": 0.1, "model": {"layers": 2}})
    claim(tmp_path, {"lr": 0.1, "model": {"layers": 2}})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"another configuration \(model.layers: 2 -> 4\): give another"):
        claim(tmp_path, {"lr": 0.1, "model": {"layers": 4}})
    assert (tmp_path / "config.json").read_bytes() == before
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        claim(tmp_path, {})


def test_a_tuple_and_the_list_that_it_becomes_are_the_same_configuration(tmp_path):
    for _ in range(2):
        claim(tmp_path, {"prompts": ("a", "b")})


def test_json_is_replaced_in_one_step(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_of_a_resumed_run_have_no_gap_and_no_repeat(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    with Metrics(tmp_path, resume_at=5) as metrics:
        assert [row["step"] for row in metrics.history] == [1, 2, 3, 4, 5]
        metrics.write(6, {"loss": np.float32(0.5)})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path)[-1]["loss"] == 0.5
    assert list((tmp_path / "tb").iterdir())


def test_metrics_without_a_folder_are_kept_in_memory():
    with Metrics(None) as metrics:
        metrics.write(1, {"loss": jnp.float32(2)})
    assert metrics.history[0]["loss"] == 2.0


def test_a_notice_is_said_once(capsys):
    for _ in range(3):
        log.say_once("a fallback of this test")
    assert capsys.readouterr().err == "a fallback of this test\n"


def tree(value):
    return {"w": jnp.full((4, 3), value, jnp.bfloat16), "step": jnp.int32(value), "state": {}}


def test_checkpoints_keep_the_newest_and_come_back_bit_by_bit(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step is None
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step))
            checkpoints.save(step, tree(99))  # is there already
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step == 3
        restored = checkpoints.restore(jax.eval_shape(lambda: tree(0)))
    assert jax.tree.structure(restored) == jax.tree.structure(tree(3))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), restored, tree(3)))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]


def test_a_checkpoint_of_another_tree_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match=r"restored.*remove that folder"):
        checkpoints.restore({"other": jnp.zeros(3)})


def test_a_damaged_checkpoint_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1))
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file() and "manifest" not in path.name and "metadata" not in path.name.lower():
            path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match=f"{tmp_path / '1'} cannot be restored"):
        checkpoints.restore(tree(0))


def test_the_environment_says_where_a_result_was_made():
    found = json.loads(json.dumps(runtime.environment()))
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"] == {"platform": "cpu", "kind": "cpu", "count": len(jax.devices())}
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_bytes"] > 2**28
    assert found["commit"] is None or len(found["commit"].removesuffix("-modified")) == 40


@pytest.mark.parametrize("is_on", [True, False])
def test_the_compilation_cache(tmp_path, is_on):
    code = """
import jax
from jaxfw.core.runtime import enable_compilation_cache
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
print(enable_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3 + 1)(2.0)
"""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    variables |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": str(int(is_on))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "jaxfw" / "compiled"
    assert done.stdout.strip() == (str(folder) if is_on else "None")
    assert folder.exists() is is_on and (not is_on or any(folder.iterdir()))
