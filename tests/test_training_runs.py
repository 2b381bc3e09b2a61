"""Training runs from their configs: what they leave, how they go on after a kill, and what they refuse."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxfw
from experiments.soak import arrays
from jaxfw.launch import main

ROOT = Path(__file__).parents[1]
PRETRAIN = ("--config=configs/pretrain.py:smoke", "--config.data=docs", "--config.train.steps=6",
            "--config.train.log_every=2", "--config.train.evaluate_every=6", "--config.train.save_every=3",
            "--config.train.validation_batches=1", "--config.optimizer.warmup=1")  # fmt: skip
FINETUNE = ("--config=configs/finetune.py:smoke", "--config.data=docs")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a short run; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["launch", *PRETRAIN, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def launch(tmp_path, capsys):
    """Run the launcher in this process: (exit code, stdout, stderr)."""

    def run(*words, workdir=tmp_path / "run"):
        code = main(["launch", *words, f"--workdir={workdir}"])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_plain_files(pretrained):
    names = {path.name for path in pretrained.iterdir()} - {".lock"}
    assert names == {
        "config.json", "env.json", "metrics.jsonl", "timing.jsonl", "tb", "checkpoints", "tokenizer", "model",
        "validation_before.json", "results.json", "report.html",
    }  # fmt: skip
    found = json.loads((pretrained / "results.json").read_text())
    assert found["metrics"]["steps"] == 6 and found["checks"][0]["ok"]
    assert found["metrics"]["validation"]["after"]["value"] < found["metrics"]["validation"]["before"]["value"]
    assert [row["step"] for row in rows(pretrained)] == [0, 2, 3, 4, 6]
    assert (pretrained / "report.html").read_text().count("<svg") >= 1
    m = jaxfw.load(pretrained / "model")
    assert isinstance(m.generate("The", max_new_tokens=3), str)


def test_weights_of_a_run_are_fine_tuned_by_the_same_path(pretrained, launch, tmp_path):
    code, out, err = launch(*FINETUNE, f"--config.init={pretrained}", "--config.optimizer.learning_rate=5e-3")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["validation"]
    expected = json.loads((pretrained / "results.json").read_text())["metrics"]["validation"]["after"]
    assert found["before"]["value"] == pytest.approx(expected["value"], abs=0.5), "it begins where the weights were"
    assert found["after"]["value"] < found["before"]["value"]
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() == (
        pretrained / "model" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("quantise", ["", "int8"])
def test_adapters_are_trained_beside_a_base_that_stays(pretrained, launch, tmp_path, quantise):
    code, _, err = launch(
        *FINETUNE[1:], "--config=configs/finetune.py:lora,smoke", f"--config.init={pretrained}",
        f"--config.quantise={quantise}", "--config.train.steps=60", "--config.train.batch=8",
        "--config.train.length=64", "--config.train.evaluate_every=60", "--config.train.validation_batches=2",
        "--config.lora.rank=4",
        "--config.lora.alpha=16.0", "--config.optimizer.learning_rate=2e-2", "--config.optimizer.average=0.9",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert found["change"]["high"] < 0, "held-out rows became likelier, surely"
    (step, _), held = arrays(tmp_path / "run" / "checkpoints")
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    adapters = sum(x.nbytes for x in saved.values())
    assert step == 60 and sum(x.nbytes for x in held.values()) <= 4 * adapters + 64, "adapters, two moments, an average"
    average = [x for path, x in held.items() if "average" in path and "['q']" in path and path.endswith("['b']")]
    written = [x for name, x in saved.items() if "q_proj.lora_B" in name]
    assert len(average) == len(written) == 2, list(held)[:5]
    assert all(any(np.array_equal(x.T, y) for y in written) for x in average), "what was scored is what is saved"


def test_a_run_goes_on_from_another_ones_checkpoint(pretrained, launch, tmp_path):
    code, out, err = launch(*PRETRAIN, f"--config.resume={pretrained}", "--config.optimizer.weight_decay=0.2")
    assert code == 0 and f"resumed from {pretrained / 'checkpoints'}/6" in out, err
    earlier = str(pretrained / "checkpoints" / "3")
    code, out, err = launch(*PRETRAIN, f"--config.resume={earlier}", workdir=tmp_path / "earlier")
    assert code == 0 and "/3\n" in out, err
    same = lambda path: (path / "model" / "model.safetensors").read_bytes()  # noqa: E731
    assert same(tmp_path / "earlier") == same(pretrained), "from step 3 on, the same steps"


WRONG = [
    (("--config.data=",), 2, "config.data='' is empty"),
    (("--config.data=no-such-folder/*.txt",), 2, "no-such-folder"),
    (("--config.train.batch=0",), 2, "train.batch=0 must be at least 1"),
    (("--config.train.steps=0", "--config.train.epochs=0.0"), 2, "give steps, or 0"),
    (("--config.reading.packing=rows",), 2, "reading.packing='rows' is unknown. Known: documents, stream"),
    (("--config.reading.held_out=1",), 2, "reading.held_out=1 must be at least 2"),
    (("--config.train.length=4096",), 2, "train.length=4096 exceeds the model's 1024 positions"),
    (("--config.mesh=fsdp=3",), 2, "mesh fsdp=3 needs 3 devices"),
    (("--config.mesh=rows=1",), 2, "rows"),
    (("--config.tokenizer=",), 2, "config.tokenizer='' with no config.init"),
    (("--config.quantise=int4",), 2, "holds weights that cannot be trained"),
    (("--config.resume=no/such/run",), 2, "config.resume='no/such/run' is not a directory"),
    (("--config.resume=docs",), 2, "config.resume='docs' has no checkpoints folder"),
    (("--config.optimizer.warmup=6",), 2, "optimizer.warmup=6"),
]


@pytest.mark.parametrize("words, code, message", WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_used_is_named(launch, words, code, message):
    found, _, err = launch(*PRETRAIN, *words)
    assert found == code and message in err and "Traceback" not in err, err


def test_another_batch_size_is_refused_by_name(pretrained, launch):
    code, _, err = launch(*PRETRAIN, f"--config.resume={pretrained}", "--config.train.batch=4")
    assert code == 2 and "was trained on other data (batch: 8 -> 4)" in err, err


def test_other_data_are_refused_by_name(pretrained, launch):
    code, _, err = launch(*PRETRAIN, f"--config.resume={pretrained}", "--config.data=README.md")
    assert code == 2 and "was trained on other data (" in err and "fingerprint" in err, err


def test_another_configuration_in_the_same_workdir_is_refused(pretrained, launch):
    code, _, err = launch(*PRETRAIN, "--config.seed=1", workdir=pretrained)
    assert code == 2 and "seed: 0 -> 1" in err


def test_weights_of_another_shape_are_listed(pretrained, launch):
    code, _, err = launch(*PRETRAIN, f"--config.init={pretrained}", "--config.model.ffn=48", "--config.model.layers=3")
    assert code == 2 and "holds another model than config.model: missing layers_2/" in err, err
    assert "layers_0/mlp/down/kernel is [64, 32], wanted [48, 32]" in err or "and " in err


def test_a_truncated_checkpoint_is_named(pretrained, launch, tmp_path):
    workdir = shutil.copytree(pretrained, tmp_path / "run")
    for path in (workdir / "checkpoints" / "6" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    code, _, err = launch(*PRETRAIN)
    assert code == 2 and "checkpoints/6 cannot be restored" in err and "remove that folder" in err, err
    shutil.rmtree(workdir / "checkpoints" / "6")
    code, out, err = launch(*PRETRAIN)
    assert code == 0 and "resumed from checkpoints/3" in out, err
    assert (workdir / "metrics.jsonl").read_bytes() == (pretrained / "metrics.jsonl").read_bytes()
    assert jax.device_count() == 1
