"""Checkpoints: notes beside them, the newest few kept, damage and full disks told by name."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import InputError

TREE = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "step": jnp.int32(4)}


def save_three(folder, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, jax.tree.map(lambda x, by=step: x * by, TREE), notes={"data": {"batch": step}})
    return folder


def test_the_newest_comes_back_with_its_notes(tmp_path):
    with Checkpoints(save_three(tmp_path)) as checkpoints:
        assert checkpoints.latest_step == 3 and checkpoints.notes() == {"data": {"batch": 3}}
        found = checkpoints.restore(TREE)
    np.testing.assert_array_equal(found["w"], TREE["w"] * 3)
    assert int(found["step"]) == 12


@pytest.mark.parametrize("keep", [1, 2])
def test_so_many_are_kept(tmp_path, keep):
    save_three(tmp_path, keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"][-keep:]


def test_an_earlier_one_comes_back_when_asked_for(tmp_path):
    with Checkpoints(save_three(tmp_path), read_only=True) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(TREE, step=2)["w"], TREE["w"] * 2)
        assert checkpoints.notes(step=2) == {"data": {"batch": 2}}


def test_another_dtype_or_tree_is_no_state_of_this_run(tmp_path):
    with (
        Checkpoints(save_three(tmp_path)) as checkpoints,
        pytest.raises(InputError, match="3 cannot be restored"),
    ):
        checkpoints.restore({"w": TREE["w"], "other": TREE["step"]})


@pytest.mark.parametrize("half", ["truncated", "missing"])
def test_a_damaged_one_is_named_and_the_one_before_it_is_whole(tmp_path, half):
    save_three(tmp_path)
    for path in (tmp_path / "3" / "state").rglob("d/*"):
        if half == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=r"/3 cannot be restored .*remove that folder to go back"):
            checkpoints.restore(TREE)
        np.testing.assert_array_equal(checkpoints.restore(TREE, step=2)["w"], TREE["w"] * 2)


FULL = """
import resource, sys, signal
import jax, numpy as np
from pathlib import Path
from jaxfw.core.checkpoint import Checkpoints
from jaxfw.core.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
small, large = ({"w": np.random.default_rng(0).standard_normal(n).astype(np.float32)} for n in (100, 200_000))
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(1, small)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    try:
        checkpoints.save(2, large)
        checkpoints.wait()
    except RunError as error:
        print("said:", error)
    else:
        print("nothing was said")
"""


def test_a_disk_that_is_full_is_told_and_the_last_whole_one_stays(tmp_path):
    """A limit on the size of files stands in for the end of the disk: the same writes fail, as another user's too."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert said and "cannot be written" in said[0] and "complete one is of step 1. Make room" in said[0], done
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(3, TREE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"], "what was half written is cleared away"


def test_without_a_folder_nothing_is_kept():
    with Checkpoints(None) as checkpoints:
        checkpoints.save(1, TREE)
        assert checkpoints.latest_step is None
