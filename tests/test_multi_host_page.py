"""The page docs/multi_host.md shows the scripts that stand beside it, and they run, with small launchers of our own."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxfw.core.launchers import Found, Processes, resolve
from tests.processes import environment, free_port

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "docs" / "scripts"
PAGE = (ROOT / "docs" / "multi_host.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|python|yaml)\n(.*?)```", PAGE, flags=re.S)
PROGRAM = "docs/scripts/multi_host.py"

# Each starts the tasks at once on this machine, with the variables that the real one sets.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for i in 1 0; do
    SLURM_JOB_ID=$PORT SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=4 SLURM_STEP_NODELIST=localhost \\
        SLURM_STEP_TASKS_PER_NODE=2 SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NODEID=0 "$@" & running+=($!)
done
for process in "${running[@]}"; do wait $process || exit 1; done
"""
MPIRUN = """#!/usr/bin/env bash
count=$2; shift 2
while [[ $1 == --* ]]; do shift 2; done
for ((i = count; i-- > 0; )); do
    PMIX_NAMESPACE=prterun-$PORT OMPI_COMM_WORLD_SIZE=$count OMPI_COMM_WORLD_LOCAL_SIZE=$count \\
        OMPI_COMM_WORLD_RANK=$i OMPI_COMM_WORLD_LOCAL_RANK=$i "$@" & running+=($!)
done
for process in "${running[@]}"; do wait $process || exit 1; done
"""
SSH = """#!/usr/bin/env bash
[[ "$1 $2 $3 $4" == "-tt -o BatchMode=yes localhost" ]] || exit 9
exec bash -c "$5"
"""
PYTHON = f"""#!/usr/bin/env bash
exec {sys.executable} "$@"
"""


@pytest.fixture(scope="module")
def launchers(tmp_path_factory):
    """A folder with the small launchers, to stand first in PATH."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in (("srun", SRUN), ("mpirun", MPIRUN), ("ssh", SSH), ("python", PYTHON)):
        path = folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def run(launchers):
    """Run a command of the page with another program in the place of its own; what it prints."""

    def run(command, program=PROGRAM):
        path = f"{launchers}{os.pathsep}{os.environ['PATH']}"
        env = environment(JAX_PLATFORMS="cpu", PATH=path, PORT=str(free_port()), PYTHON="python")
        words = ["bash", "-c", command.replace(PROGRAM, program)]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_two_processes_train_as_one_does(run):
    alone = subprocess.run(
        [sys.executable, PROGRAM], cwd=ROOT, env=environment(devices=2, JAX_PLATFORMS="cpu"), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert f"bash docs/scripts/two_processes.sh {PROGRAM}" in PAGE
    (line,) = [line for line in run(f"bash docs/scripts/two_processes.sh {PROGRAM}").splitlines() if "loss" in line]
    assert line.startswith("2 devices of 2 processes: loss ")
    assert line.split("loss") == ["2 devices of 2 processes: ", alone.stdout.splitlines()[-1].split("loss")[1]]


COMMANDS = {
    "SLURM": f"bash docs/scripts/slurm.sh {PROGRAM}",
    "Open MPI": next(block for block in BLOCKS if block.startswith("mpirun")),
    "JAXFW_*": f'bash docs/scripts/ssh.sh "localhost localhost" {PROGRAM}',
}


@pytest.mark.slow
@pytest.mark.parametrize("source", COMMANDS)
def test_processes_that_are_started_as_the_page_says_join(source, run):
    said = run(COMMANDS[source], "tests/two_processes.py joined")
    found = sorted((json.loads(line) for line in said.splitlines() if line.startswith("{")), key=lambda it: it["index"])
    assert [(one["index"], one["count"], one["source"]) for one in found] == [(0, 2, source), (1, 2, source)]
    assert [one["jax"] for one in found] == [[0, 2, 2, 1], [1, 2, 2, 1]]


def test_the_page_shows_the_scripts_as_they_are():
    for path in SCRIPTS.iterdir():
        if path.is_file():
            assert path.read_text(encoding="utf-8") in BLOCKS, path.name
            assert f"docs/scripts/{path.name}" in PAGE
    named = set(re.findall(r"docs/scripts/[\w.]+", PAGE))
    assert len(named) == 5 and all((ROOT / name).exists() for name in named)


def test_pods_of_the_job_set_find_each_other():
    manifest = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text(encoding="utf-8"))
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    name, count = manifest["metadata"]["name"], job["parallelism"]
    # The names that JobSet gives to pods, and its domain.
    address = f"{name}-{group['name']}-0-0.{name}:61500"
    for index in range(count):
        pod = given | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)}
        assert resolve(Found(""), pod) == Processes(index, count, address, None, "Kubernetes")
    assert job["completions"] == count and job["completionMode"] == "Indexed"


def test_messages_on_the_page_are_those_of_the_code():
    said = "".join((ROOT / "jaxfw" / "core" / name).read_text() for name in ("roll_call.py", "distributed.py"))
    for words in ("processes joined at", "did not reach process 0", "cannot listen", "came twice"):
        assert words in PAGE and words in said
