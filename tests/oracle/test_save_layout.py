"""What we save is what transformers saves, tensor by tensor and byte by byte; each reads the other's shards."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from experiments import parity  # noqa: E402
from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.weights import load, save  # noqa: E402

TIED, BIASED = parity.CASES["llama3"], parity.CASES["yarn, mscale"]


def stored(directory):
    """Tensor name -> (dtype, shape, bytes) over all safetensors files, and the files' metadata."""
    found, metadata = {}, []
    for path in sorted(directory.glob("*.safetensors")):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        metadata.append(header.pop("__metadata__"))
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], raw[end + first : end + last])
    return found, metadata


def mixed(model):
    """bfloat16 with float32 norms and a float16 head, as some checkpoints are."""
    model = model.bfloat16()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.data = tensor.data.float()
        if name == "lm_head.weight":
            tensor.data = tensor.data.half()
    return model


CASTS = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "mixed": mixed,
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("case", [TIED, BIASED], ids=["tied", "untied, biased"])
def test_names_dtypes_and_bytes(tmp_path, case, cast):
    CASTS[cast](parity.make_model(case)).save_pretrained(tmp_path / "theirs")
    checkpoint = load(tmp_path / "theirs")
    save(tmp_path / "ours", checkpoint.config, checkpoint.params, attributes=checkpoint.attributes)
    (theirs, their_metadata), (ours, our_metadata) = stored(tmp_path / "theirs"), stored(tmp_path / "ours")
    assert sorted(ours) == sorted(theirs)
    assert ("lm_head.weight" in ours) is not case.tied
    assert {name for name in ours if ours[name] != theirs[name]} == set()
    assert our_metadata == their_metadata
    if cast == "mixed":
        assert len({dtype for dtype, _, _ in ours.values()}) == (2 if case.tied else 3)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["dtype"] == checkpoint.attributes["dtype"]


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9], ids=["shards", "one file"])
@pytest.mark.parametrize("name", parity.CASES)
def test_transformers_reads_ours(oracle, tmp_path, name, shard_bytes):
    """From parameters to a directory to transformers: the same tensors to the bit, the same logits."""
    built = oracle(name)
    directory = save(tmp_path / "ours", built.config, built.params, shard_bytes=shard_bytes)
    assert (directory / "model.safetensors.index.json").exists() is (shard_bytes == 50_000)
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = built.model.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    read = parity.Oracle(built.case, model, built.config, built.params, built.tokens, built.logits)
    logits = parity._reference_logits(read).detach().numpy()
    assert np.abs(logits - built.logits)[built.valid].max() / built.deviation <= parity.TOLERANCE["logits"]


@pytest.mark.parametrize("case", [TIED, BIASED], ids=["tied", "untied, biased"])
def test_we_read_transformers_shards(tmp_path, case):
    model = parity.make_model(case)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load(tmp_path / "whole"), load(tmp_path / "shards")
    assert whole.config == shards.config
    assert jax.tree.structure(whole.params) == jax.tree.structure(shards.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, shards.params))


def test_our_index_is_laid_out_as_theirs(tmp_path):
    parity.make_model(TIED).save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    checkpoint = load(tmp_path / "theirs")
    save(tmp_path / "ours", checkpoint.config, checkpoint.params, shard_bytes=50_000)
    theirs, ours = (
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("theirs", "ours")
    )
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert set(ours["weight_map"].values()) == {p.name for p in (tmp_path / "ours").glob("*.safetensors")}


def test_our_loader_refuses_a_shard_of_theirs_that_is_missing(tmp_path):
    parity.make_model(TIED).save_pretrained(tmp_path, max_shard_size="50KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        load(tmp_path)
