"""The launcher: what it leaves, how it goes on, and what it says to every wrong input, in one line and without loss."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from jaxfw.core.workdir import open_workdir
from jaxfw.data import train_bpe
from jaxfw.generate import LM
from jaxfw.launch import main
from jaxfw.models import DecoderConfig, init

ROOT = Path(__file__).parents[1]
TEXTS = ["a b c d e f g", "the words of a small tokenizer, and some more of them"]
CONFIG = DecoderConfig(vocab=300, width=16, ffn=24, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A small model directory, complete; tests take copies."""
    tokenizer = train_bpe(TEXTS, vocab_size=280)
    lm = LM(CONFIG, init(CONFIG, jax.random.key(0)), tokenizer, stop_ids=(tokenizer.eos_id,))
    directory = tmp_path_factory.mktemp("models") / "model"
    lm.save(directory)
    return directory


@pytest.fixture
def model(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def launch(tmp_path, capsys):
    """Run the launcher in this process: (exit code, stdout, stderr)."""

    def run(*words, workdir=tmp_path / "run"):
        code = main(["launch", *words, *([f"--workdir={workdir}"] if workdir else [])])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def ask(model, *words):
    return ("--config=configs/generate.py:smoke", f"--config.model={model}", *words)


QUICKSTART = "--config=configs/quickstart.py:smoke"


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- what a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of the main job's smoke run, and what a second process printed on it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    command = [sys.executable, "-m", "jaxfw.launch", QUICKSTART, f"--workdir={workdir}"]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False) for _ in range(2)]
    for one in runs:
        assert one.returncode == 0, one.stdout + one.stderr
    return workdir, [one.stdout for one in runs]


def test_the_main_job_leaves_plain_files(finished):
    workdir, _ = finished
    names = {path.name for path in workdir.iterdir()} - {".lock"}
    assert names == {
        "config.json",
        "env.json",
        "metrics.jsonl",
        "timing.jsonl",
        "tb",
        "checkpoints",
        "results.json",
        "report.html",
        "model",
    }
    results = json.loads((workdir / "results.json").read_text())
    assert results["checks"] and all({"name", "value", "bound", "ok"} == set(check) for check in results["checks"])
    losses = results["metrics"]["validation"]
    assert losses["model"]["low"] < losses["model"]["value"] < losses["model"]["high"]
    assert losses["model"]["value"] < losses["unigram"]["value"]
    assert json.loads((workdir / "config.json").read_text())["model"]["layers"] == 2
    assert json.loads((workdir / "env.json").read_text())["command"].endswith(f"{QUICKSTART} --workdir={workdir}")
    page = (workdir / "report.html").read_text()
    assert page.count("<svg") >= 2 and "checks ok" in page


def test_the_same_command_again_goes_on_from_the_end(finished):
    workdir, (first, second) = finished
    assert "resumed" not in first
    assert "resumed from checkpoints/60, 60 of 60 steps are done" in second and "step 20/60" not in second
    env = json.loads((workdir / "env.json").read_text())
    assert len(env["earlier"]) == 1 and env["earlier"][0]["started"] <= env["started"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 60


def test_the_model_that_it_leaves_answers_through_the_launcher(finished, launch):
    workdir, _ = finished
    code, out, err = launch(*ask(workdir / "model", "--config.temperature=0.8"))
    assert (code, err) == (0, "") and "report: " in out


def test_a_dry_run_says_what_it_takes_and_writes_nothing(launch, tmp_path):
    code, out, _ = launch("--config=configs/quickstart.py", "--config.model.layers=2", "--dry-run")
    assert code == 0 and '"layers": 2' in out
    for name in ("parameters: ", "parameter bytes: ", "training state bytes: ", "FLOPs per step: "):
        assert name in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_model_reads_no_tensor(launch, model):
    path = model / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with open(path, "r+b") as file:
        file.seek(header)
        file.write(b"\xff" * (path.stat().st_size - header))  # NaN everywhere, had anybody looked
    code, out, _ = launch(*ask(model), "--dry-run")
    assert code == 0 and "parameters: " in out and "FLOPs of a prompt of 32: " in out


def test_a_run_whose_check_fails_exits_with_1(launch, tmp_path):
    code, out, _ = launch(QUICKSTART, "--config.train.steps=6", "--config.optimizer.learning_rate=1e-9")
    assert code == 1 and "FAILED loss minus that of the unigram baseline" in out
    assert "1 of 4 checks failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_diverges_exits_with_1_and_says_what_to_do(launch):
    code, _, err = launch(QUICKSTART, "--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=1e30")
    assert (
        code == 1
        and "train/grad_norm=nan in step 2 (of steps 1 to 5, looked at together)" in err
        and "lower optimizer.learning_rate" in err
    )


def test_help_is_the_docstring(launch):
    code, out, _ = launch("--help")
    assert code == 0 and "python -m jaxfw.launch --config=configs/quickstart.py" in out


# --- wrong command lines


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["--config is given 0 times", "--config=configs/quickstart.py"]),
        (
            ["--config=configs/quickstrat.py"],
            ["'configs/quickstrat.py' is unknown", "Did you mean 'configs/quickstart.py'?"],
        ),
        (["--config=configs/quickstart.py:smok"], ["mini-argument='smok' is unknown", "Did you mean 'smoke'?"]),
        (
            [QUICKSTART, "--config.model.layer=3"],
            ["--config.model.layer", "'layer' is unknown", "Did you mean 'layers'?"],
        ),
        ([QUICKSTART, "--config.train.steps=many"], ["--config.train.steps=many", "invalid literal for int()"]),
        ([QUICKSTART, "--wrokdir=x"], ["Unknown command line flag 'wrokdir'", "workdir"]),
        ([QUICKSTART, "stray"], ["'stray' is not a flag"]),
        (
            [QUICKSTART, "--config.experiment=experiments.quickstrat"],
            ["'experiments.quickstrat' is unknown", "Did you mean 'experiments.quickstart'?"],
        ),
        ([QUICKSTART, "--config.model.kv_heads=3"], ["model.heads=2 must be a multiple of model.kv_heads=3"]),
        ([QUICKSTART, "--config.model.vocab=100"], ["vocab_size=100"]),
        ([QUICKSTART, "--config.train.batch=0"], ["train.batch=0 must be at least 1"]),
        ([QUICKSTART, "--config.seed=-1"], ["config.seed=-1", "0 or more"]),
        ([QUICKSTART, "--config.generate.new_tokens=5000"], ["generate.new_tokens=5000", "model.positions=1024"]),
        ([QUICKSTART, "--config.generate.prompts=()"], ["generate.prompts=() is empty"]),
        ([QUICKSTART, "--config.optimizer.b1=1.5"], ["optimizer.b1=1.5 must be in [0, 1)"]),
        (["--confg=configs/quickstart.py"], ["--config is given 0 times", "--confg=configs/quickstart.py?"]),
        (["--config=nowhere/quickstart.py"], ["nowhere/quickstart.py does not exist in", "root of a checkout"]),
        (["--config=README.md"], ["--config=README.md is no config file", "SyntaxError"]),
        ([QUICKSTART, "--config.train.length=2000"], ["train.length=2000 exceeds model.positions=1024"]),
        ([QUICKSTART, "--config.documents=1"], ["fewer than one window of length=64", "lower length"]),
        ([QUICKSTART, "--config.optimizer.warmup=60"], ["optimizer.warmup=60 must be below the run's 60 steps"]),
    ],
)
def test_wrong_command_lines(launch, words, parts):
    code, _, err = launch(*words)
    assert_says(code, err, parts)


def assert_says(code, err, parts):
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def test_no_workdir(launch):
    code, _, err = launch(QUICKSTART, workdir=None)
    assert_says(code, err, ["--workdir is missing", "--workdir=runs/quickstart"])


def test_what_was_refused_leaves_the_workdir_free(launch, tmp_path):
    code, _, err = launch(QUICKSTART, "--config.generate.new_tokens=5000")
    assert_says(code, err, ["generate.new_tokens=5000"])
    code, _, err = launch(QUICKSTART, "--config.documents=1")
    assert_says(code, err, ["fewer than one window"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_folder_of_something_else_is_not_a_workdir(launch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    code, _, err = launch(QUICKSTART)
    assert_says(code, err, ["is not empty and holds no run (thesis.tex)", "give a new folder"])


def test_two_launchers_on_one_workdir(launch, tmp_path):
    with open_workdir(tmp_path / "run"):
        before = contents(tmp_path / "run")
        code, _, err = launch(QUICKSTART)
        assert_says(code, err, ["is in use by process", "give another --workdir"])
        assert contents(tmp_path / "run") == before


def test_another_configuration_on_a_used_workdir(launch, finished):
    workdir, _ = finished
    before = contents(workdir)
    code, _, err = launch(QUICKSTART, "--config.model.layers=3", workdir=workdir)
    assert_says(code, err, ["another configuration (model.layers: 2 -> 3)", "give another --workdir"])
    assert contents(workdir) == before


def test_a_workdir_that_is_a_file(launch, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = launch(QUICKSTART, workdir=tmp_path / "file")
    assert_says(code, err, ["cannot be written", "give another folder"])
    assert (tmp_path / "file").read_text() == "mine"


def test_traceback_on_request(launch, capsys):
    _, _, err = launch(QUICKSTART, "--config.train.batch=0", "--traceback")
    assert "Traceback" in err and "error: train.batch=0" in err


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "jaxfw.launch", "--config=configs/generate.py", f"--workdir={tmp_path}"]
    # jax's CUDA plugin, installed beside it to compile without a GPU, reports that there is none.
    environment = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: config.model='' is empty: name a Hugging Face directory, as in --config.model=DIR.\n"


# --- wrong model directories, and wrong questions to a good one


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(model, change):
    path = model / "model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(model):
    """Cut the model in two, with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    halves = {f"model-{i + 1:05d}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in halves.items():
        save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(model):
    shard(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 64 + path.read_bytes()[72:])


def pickled(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")


QUERY = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "unknown attribute": (lambda m: edit_json(m / "config.json", foo_scale=3), ["foo_scale=3", "remove them"]),
    "attribute off its default": (lambda m: edit_json(m / "config.json", hidden_act="gelu"), ["'gelu'", "'silu'"]),
    "unknown family": (lambda m: edit_json(m / "config.json", model_type="lama"), ["model_type='lama'", "'llama'"]),
    "quantised": (
        lambda m: edit_json(m / "config.json", quantization_config={"quant_method": "gptq"}),
        ["quantization_config", "unquantised"],
    ),
    "missing tensor": (lambda m: edit_tensors(m, lambda t: t.pop(QUERY)), [f"missing: {QUERY}"]),
    "unexpected tensor": (lambda m: edit_tensors(m, lambda t: t.update(extra=t[QUERY].copy())), ["unexpected: extra"]),
    "misshaped tensor": (
        lambda m: edit_tensors(m, lambda t: t.update({QUERY: t[QUERY][:8].copy()})),
        [f"{QUERY} is [8, 16], config.json asks for [32, 16]"],
    ),
    "truncated": (truncate, ["model.safetensors", "truncated or corrupt", "download it again"]),
    "corrupt": (corrupt, ["model.safetensors", "truncated or corrupt", "download it again"]),
    "shard missing": (missing_shard, ["model-00002-of-00002.safetensors", "download the missing shard"]),
    "pickle": (pickled, ["pytorch_model.bin", "can run code", "save_pretrained"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["config.json", "does not exist"]),
    "damaged config": (lambda m: (m / "config.json").write_text("{"), ["config.json", "is not valid JSON"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    "tokenizer larger than the vocabulary": (
        lambda m: (edit_json(m / "config.json", vocab_size=260), edit_tensors(m, lambda t: t.update(
            {name: t[name][:260].copy() for name in ("model.embed_tokens.weight", "lm_head.weight")}))),
        ["279", "260", "tokenizer that belongs to this model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_directories(launch, model, damage):
    spoil, parts = DAMAGES[damage]
    spoil(model)
    before = contents(model)
    code, _, err = launch(*ask(model))
    assert_says(code, err, parts)
    assert contents(model) == before


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--config.model=nowhere"], ["nowhere", "is not a directory"]),
        (["--config.dtype=int8"], ["dtype='int8' is unknown", "bfloat16"]),
        (["--config.prompts=()"], ["config.prompts=() is empty"]),
        (["--config.new_tokens=1000"], ["1000 new tokens exceed the model's 64 positions"]),
        (["--config.new_tokens=0"], ["max_new_tokens=0 must be at least 1"]),
        (["--config.temperature=-1.0"], ["temperature=-1.0 must be above 0"]),
        (["--config.temperature=1.0", "--config.top_p=2.0"], ["top_p=2.0 must be in (0, 1]"]),
        (["--config.top_p=0.5"], ["top_k, top_p and min_p filter random draws", "temperature"]),
        (["--config.timed_prompt=1020"], ["config.timed_prompt=1020", "lower timed_prompt"]),
        (["--config.seed=-1"], ["config.seed=-1"]),
    ],
)
def test_wrong_questions(launch, model, words, parts):
    code, _, err = launch(*ask(model), *words)
    assert_says(code, err, parts)


def test_an_empty_prompt(launch, model):
    """With a tokenizer that puts no beginning-of-text token before it, nothing is left to continue."""
    edit_json(model / "tokenizer.json", post_processor=None)
    code, _, err = launch(*ask(model), "--config.prompts=('a', '')")
    assert_says(code, err, ["prompt 1 is empty"])
