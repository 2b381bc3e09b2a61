"""transformers 4, which most of the Hub was written with, reads what we save, and we read what it saves.

Two versions of one library do not fit in one process. Point JAXFW_TRANSFORMERS4 to a folder that holds the older one:

    pip install --target DIR "transformers==4.57.*"
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
OLDER = os.environ.get("JAXFW_TRANSFORMERS4", "")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not OLDER, reason="JAXFW_TRANSFORMERS4 does not name a folder with transformers 4"),
]

from experiments import parity  # noqa: E402
from jaxfw.weights import load, save  # noqa: E402

# argv: a folder with transformers 4, a folder with one saved model per folder.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import json, pathlib
import numpy as np
import torch, transformers
for directory in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory / "ours", attn_implementation="eager", output_loading_info=True)
    tokens, lengths = np.load(directory / "tokens.npy"), np.load(directory / "lengths.npy")
    rows = np.zeros((*tokens.shape, model.config.vocab_size), np.float32)
    for out, row, length in zip(rows, tokens, lengths):
        if model.config.model_type == "llama":  # it keeps the frequencies of the longest row
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        with torch.no_grad():
            out[:length] = model(torch.from_numpy(row[None, :length]).long()).logits[0].numpy()
    np.save(directory / "logits.npy", rows)
    model.save_pretrained(directory / "again")
    loaded = {kind: list(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    (directory / "report.json").write_text(json.dumps({"version": transformers.__version__, **loaded}))
"""


@pytest.fixture(scope="module")
def exchanged(oracle, tmp_path_factory):
    """Case name -> its folder, after transformers 4 has read `ours` and written `again`."""
    root = tmp_path_factory.mktemp("exchanged")
    folders = {}
    for i, name in enumerate(parity.CASES):
        built, folders[name] = oracle(name), root / f"{i:02d}"
        folders[name].mkdir()
        save(folders[name] / "ours", built.config, built.params, model_type=built.case.model_type)
        np.save(folders[name] / "tokens.npy", built.tokens)
        np.save(folders[name] / "lengths.npy", built.lengths)
    done = subprocess.run([sys.executable, "-c", SCRIPT, OLDER, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.mark.parametrize("name", parity.CASES)
def test_it_reads_ours(oracle, exchanged, name):
    built = oracle(name)
    report = json.loads((exchanged[name] / "report.json").read_text())
    assert report.pop("version").startswith("4.")
    assert report == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    difference = np.abs(np.load(exchanged[name] / "logits.npy") - built.logits)[built.valid].max()
    assert difference / built.deviation <= parity.TOLERANCE["logits"]


@pytest.mark.parametrize("name", parity.CASES)
def test_we_read_its(oracle, exchanged, name):
    built, again = oracle(name), load(exchanged[name] / "again")
    assert again.config == built.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, built.params))
