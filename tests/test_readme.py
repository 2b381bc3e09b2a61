"""The README's commands exist, its code runs, and its figures are those of the committed results."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.soak import SETTINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
SHELL = "\n".join(text for language, text in BLOCKS if language == "")
PYTHON = [text for language, text in BLOCKS if language == "python"]
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((ROOT / "experiments" / "results" / name).read_text())


def test_make_targets_exist():
    known = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    used = set(re.findall(r"^make ([a-z0-9]+)", SHELL, flags=re.M)) | set(re.findall(r"`make ([a-z0-9]+)`", README))
    assert {"demo", "test", "help"} <= used <= known


def test_configs_and_links_exist():
    named = set(re.findall(r"--config=([\w/]+\.py)", README)) | set(re.findall(r"\]\(([\w./]+)\)", README))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_every_command_that_only_looks_runs():
    looks = [line.split("#")[0].strip() for line in SHELL.splitlines() if "--dry-run" in line]
    assert looks
    for line in looks:
        done = subprocess.run([sys.executable, *line.split()[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_code_runs_in_the_order_in_which_it_stands(tmp_path):
    """The notebook cell trains (its smoke size); the model then comes from the main job's smoke run.

    So do the commands that read a model.
    """
    for name in ("configs", "docs", "experiments", "jaxfw"):
        (tmp_path / name).symlink_to(ROOT / name)
    launch = ["-m", "jaxfw.launch", "--config=configs/quickstart.py:smoke", "--workdir=runs/quickstart"]
    done = subprocess.run([sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "\n".join(line for block in PYTHON for line in block.splitlines() if not line.startswith(("!", "%")))
    commands = [
        line.split("  ")[0].replace("--n=100", "--n=4")
        for line in SHELL.splitlines()
        if any(word in line for word in ("runs/quickstart/model", "runs/half", "runs/pretrain", "embedded-1"))
    ]
    assert len(commands) == 9
    examples = "\n".join(re.findall(r"```python\n(.*?)```", TRAINING, flags=re.S))
    for words in (["-c", code], ["-c", examples], *(shlex.split(line)[1:] for line in commands)):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{words[:4]}: {done.stderr}"
    shutil.rmtree(tmp_path / "runs")


def test_it_is_short_and_names_the_ten_systems():
    assert len(README.splitlines()) <= 250
    rows = re.findall(r"^\| (\d+) \|.*`jaxfw/(\w+)`", README, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 11))
    assert len({name for _, name in rows}) == 10


def _figures_of_kernels_and_seams():
    kernels, seams = results("kernels.json"), results("seams.json")["jobs"]
    (count,) = {len(found["rows"]) for found in kernels.values()}
    (spilled,) = {row["spilled_bytes"] for found in kernels.values() for row in found["rows"]}
    programs, loading = results("h200.json")["programs"], results("load.json")["jobs"]
    step = programs["decode step, tensor=8, batch 8, cache 32768"]
    four_bits = programs["decode step, one GPU, batch 1, cache 8192, int4"]["bytes_per_device"]["total"]
    largest = max(found["largest_bytes"] for found in step["collectives"].values())
    ratios = (f"{job['ratio']:.2f} ({job['interval'][0]:.2f} to {job['interval'][1]:.2f})" for job in seams)
    return [
        f"on jax {' and '.join(kernels)} | {count} programs each, {spilled} bytes of registers spilled",
        f"{step['kernels']['decode_attention']} calls, {step['bytes_per_device']['total'] / 2**30:.2f} GiB a device, "
        f"largest collective {largest // 1024} KiB",
        f"{' and '.join(ratios)} times the seconds",
        f"{four_bits / 1e9:.2f} GB in all",
        " / ".join(f"{job['seconds_per_gib']['ours']:.1f}" for job in loading) + " s a GiB",
    ]


def test_figures_are_those_of_the_committed_results():
    parity, greedy, quickstart = results("parity.json"), results("greedy.json")["total"], results("quickstart.json")
    worst = {kind: max(row["error"] for row in parity[kind]) for kind in ("parity", "gradients")}
    weakest = min(row["times_tolerance"] for row in parity["mutations"])
    losses, gain = quickstart["metrics"]["validation"], quickstart["metrics"]["gain_over_bigram"]
    figures = [
        f"largest error {worst['parity']:.1e} of the logits' deviation".replace("e-0", "e-"),
        f"largest error {worst['gradients']:.1e} of a leaf's largest".replace("e-0", "e-"),
        f"{len(parity['mutations'])} planted one at a time",
        f"the weakest breaks the bound {weakest:,.0f}-fold",
        f"{greedy['rows']} prompts x 32 steps",
        f"{greedy['equal']} equal, {greedy['near_tied']} near-ties, {greedy['different']} different",
        f"{losses['model']['value']:.2f} nats per token, bigram model {losses['bigram']['value']:.2f}",
        f"interval of the gain {gain['low']:.2f} to {gain['high']:.2f}",
    ]
    figures += _figures_of_kernels_and_seams()
    jobs = results("cpu_lm.json")["jobs"]
    figures.append("| ratio | " + " | ".join(f"{job['ratio']:.2f}" for job in jobs) + " |")
    intervals = (f"{low:.2f} to {high:.2f}" for low, high in (job["interval"] for job in jobs))
    figures.append("| 95 % interval | " + " | ".join(intervals) + " |")
    assert not [figure for figure in figures if figure not in README]
    assert not re.findall(r"@\w+@", README)


def test_padding_is_that_of_the_committed_run():
    found, page = results("packing.json"), (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    packed, alone = found["packed"].values(), found["one_document_a_row"].values()
    assert " / ".join(f"{100 * share:.1f}" for share in packed) + " %" in page
    assert " / ".join(f"{100 * share:.0f}" for share in alone) + " %" in page
    assert f"{found['documents']:,} texts" in page and f"{found['mean_tokens']:.0f} tokens on average" in page


def test_every_setting_was_killed_twenty_times_and_lost_nothing():
    runs = results("soak.json")["results"]
    assert [run["setting"] for run in runs] == [setting.name for setting in SETTINGS]
    for run in runs:
        assert run["kills"] == len(run["hits"]) >= 20 and run["differences"] == []
        assert {hit["signal"] for hit in run["hits"]} == {"SIGKILL", "SIGTERM"}
        assert max(hit["seconds"] for hit in run["hits"]) < 60


def test_fine_tuning_is_that_of_the_committed_run():
    found = results("finetune_parity.json")
    assert found["ok"] and all(found["checks"].values())
    llama = max(error for row in found["llama"] for error in row["errors"].values())
    mixtures = [row[path] for row in found["mixtures"] for path in ("eager", "sdpa")]
    weakest = min(row["error"] for row in found["faults"])
    figures = [
        f"LLaMA {llama:.1e} nats, Qwen2-MoE {max(row['error'] for row in mixtures):.1e}".replace("e-0", "e-"),
        f"{sum(row['changed'] for row in mixtures)} tokens changed their experts",
        f"{len(found['faults'])} faults in the recipe show, the weakest by {weakest:.1e}".replace("e-0", "e-"),
    ]
    assert not [figure for figure in figures if figure not in " ".join(TRAINING.split())], figures
    assert f"{max(llama, max(row['error'] for row in mixtures)):.1e} nats".replace("e-0", "e-") in README


def test_the_table_of_families_is_that_of_the_committed_parity():
    found, page = results("parity.json"), (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    families = {row["case"]: row["family"] for row in found["parity"]}
    for family in sorted(set(families.values())):
        rows = {kind: [row for row in found[kind] if families[row["case"]] == family]
                for kind in ("parity", "gradients", "sharded", "mutations")}  # fmt: skip
        worst = [f"{max(row['error'] for row in rows[kind]):.1e}".replace("e-0", "e-") for kind in list(rows)[:3]]
        cells = " | ".join([*worst, str(len(rows["mutations"]))])
        assert re.search(rf"^\| .* \| `{family}` \| .* \| {re.escape(cells)} \|$", page, flags=re.M), (family, cells)


FILES = (
    "parity", "greedy", "cpu_lm", "quickstart", "kernels", "sharding", "h200", "seams", "load", "packing", "soak",
    "finetune_parity", "checkpoint", "harness",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_results_say_where_they_come_from(name):
    found = results(f"{name}.json")
    found = found["0.10.2"] if name == "kernels" else found
    provenance = found.get("environment", found)
    assert re.match(r"python (-u )?-m ", provenance["command"])
    assert re.fullmatch(r"[0-9a-f]{40}", provenance["commit"]), "made from a commit, with nothing changed"
    assert provenance["versions"]["jax"] and provenance["machine"]["cores"]
