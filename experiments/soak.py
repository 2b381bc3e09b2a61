"""Kill a training run again and again, and compare what it leaves with a run that nobody disturbed: bit by bit.

    python -m experiments.soak                      # all settings, 20 kills each
    python -m experiments.soak --kills=1 --setting="one device"

A life ends at a random step by SIGKILL or SIGTERM (of several processes, one of them is hit), and the same command
starts the next. In the end the parameters, the optimiser's state and metrics.jsonl must be those of the undisturbed
run: every step's loss is in there, so the order of the data is compared too.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfw.core.checkpoint import STATE, Checkpoints
from jaxfw.core.runtime import environment
from jaxfw.core.workdir import write_json

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "experiments" / "results" / "soak.json"
FOREIGN = ("SLURM", "OMPI", "JAXFW", "JOB_COMPLETION", "XLA_FLAGS")
LIFE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Setting:
    """Processes, their devices each, and the flags that lay the run out on them."""

    name: str
    processes: int = 1
    devices: int = 1
    flags: tuple[str, ...] = ()


SETTINGS = (
    Setting("one device"),
    Setting("eight devices", devices=8, flags=("--config.mesh=data=2,fsdp=2,tensor=2",)),
    Setting("two processes", processes=2, flags=("--config.mesh=fsdp=2",)),
)
# About 30 ms a step on two cores, so that a life of a few steps can be hit.
FLAGS = (
    "--config=configs/pretrain.py:smoke", "--config.data=docs", "--config.train.batch=16", "--config.train.length=128",
    "--config.model.width=64", "--config.model.heads=4", "--config.model.kv_heads=2", "--config.train.log_every=1",
    "--config.train.evaluate_every=20", "--config.train.save_every=4", "--config.train.validation_batches=1",
)  # fmt: skip


class Life:
    """One start of all processes of a run."""

    def __init__(self, setting: Setting, workdir: Path, flags: Sequence[str]):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        kept |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={setting.devices}", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "jaxfw.launch", *FLAGS, *setting.flags, *flags, f"--workdir={workdir}"]
        together = (f"--coordinator=localhost:{port}", f"--processes={setting.processes}")
        self.workdir = workdir
        self.processes = []
        for index in range(setting.processes):
            words = [*together, f"--process-id={index}"] if setting.processes > 1 else []
            with open(workdir.with_name(f"{workdir.name}-{index}.log"), "ab") as log:
                self.processes.append(subprocess.Popen([*command, *words], env=kept, stdout=log, stderr=log, cwd=ROOT))

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return 0
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        return json.loads(lines[-1])["step"] if lines else 0

    def is_over(self) -> bool:
        """Whether every process has ended."""
        return all(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float = LIFE_SECONDS) -> list[int]:
        """The exit codes of all processes."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def straight(setting: Setting, workdir: Path, flags: Sequence[str]) -> int:
    """An undisturbed run; its last step."""
    codes = Life(setting, workdir, flags).wait()
    if any(codes):
        raise SystemExit(f"{setting.name}: the undisturbed run ended with {codes}, see the logs beside {workdir}")
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def disturbed(setting: Setting, workdir: Path, flags: Sequence[str], *, kills: int, last: int, draw: random.Random):
    """A run whose lives are ended, `kills` of them; what was done at which step, and how long others outlived it."""
    hits: list[dict[str, Any]] = []
    while len(hits) < kills:
        life = Life(setting, workdir, flags)
        begins = life.step()
        share = (last - begins) // (kills - len(hits) + 1)  # of what is left, so that the run outlives them all
        target = begins + draw.randint(1, max(3 * share // 2, 1))
        while not begins < life.step() >= min(target, last - 1) and not life.is_over():  # not before it has begun
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        if life.is_over() and not any(process.returncode for process in life.processes):
            break  # it came to its end before the hit
        how, victim = draw.choice((signal.SIGKILL, signal.SIGTERM)), draw.randrange(setting.processes)
        life.processes[victim].send_signal(how)
        begun = time.monotonic()
        codes = life.wait()
        hits.append({"signal": how.name, "process": victim, "at": life.step(), "codes": codes,
                     "seconds": round(time.monotonic() - begun, 1)})  # fmt: skip
        print(setting.name, hits[-1], flush=True)
    codes = Life(setting, workdir, flags).wait()
    if any(codes):
        raise SystemExit(f"{setting.name}: the last life ended with {codes}, see the logs beside {workdir}")
    return hits


def differences(one: Path, other: Path) -> list[str]:
    """What two workdirs differ in: metrics.jsonl by bytes, the arrays of the newest checkpoint by bits, its notes."""
    found = [] if (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes() else ["metrics.jsonl"]
    held = [arrays(folder / "checkpoints") for folder in (one, other)]
    if held[0][0] != held[1][0] or held[0][1].keys() != held[1][1].keys():
        return [*found, "step, notes or names of arrays"]
    return found + [name for name, x in held[0][1].items() if x.tobytes() != held[1][1][name].tobytes()]


def arrays(folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Step and notes of the newest checkpoint, and its arrays by path, from whatever devices."""
    import orbax.checkpoint as ocp

    with Checkpoints(folder, read_only=True) as checkpoints:
        step, notes = checkpoints.latest_step, checkpoints.notes()
    path, here = folder.resolve() / str(step) / STATE, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    reader = ocp.StandardCheckpointer()
    held: Any = reader.metadata(path).item_metadata
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), held.tree)
    tree = reader.restore(path, like)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return (step, notes), {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def soak(setting: Setting, folder: Path, *, kills: int, seed: int, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Both runs of a setting below `folder`, compared."""
    one, other = folder / "straight", folder / "disturbed"
    last = straight(setting, one, flags)
    hits = disturbed(setting, other, flags, kills=kills, last=last, draw=random.Random(seed))
    return {"setting": setting.name, "steps": last, "kills": len(hits), "hits": hits,
            "differences": differences(one, other)}  # fmt: skip


def main() -> int:
    """Soak the settings that are asked for, and write the committed result when all of them were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", choices=[setting.name for setting in SETTINGS])
    options = parser.parse_args()
    chosen = [setting for setting in SETTINGS if options.setting in (None, setting.name)]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    results = []
    for setting in chosen:
        place = folder / setting.name.replace(" ", "-")
        place.mkdir()
        flags = [f"--config.train.steps={options.steps}"]
        results.append(soak(setting, place, kills=options.kills, seed=options.seed, flags=flags))
        print(f"{setting.name}: {results[-1]['kills']} kills, differences: {results[-1]['differences'] or 'none'}")
    if options.setting is None:
        write_json(RESULT, {"results": results, "environment": environment()})
    failed = any(result["differences"] or result["kills"] < options.kills for result in results)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
