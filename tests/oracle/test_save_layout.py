"""What we save is what transformers saves, tensor by tensor and byte by byte; each reads the other's shards."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from safetensors.torch import save_file  # noqa: E402

from experiments import parity  # noqa: E402
from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.weights import load, save  # noqa: E402

TIED, BIASED = parity.CASES["llama3"], parity.CASES["yarn, mscale"]
# One case of each family, and those that have other tensors than it.
FAMILIES = [*parity.first_of_families().values(), "qwen3, windows", "gpt2, untied", "qwen2_moe, some layers"]


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


def assert_saved_alike(theirs, ours):
    """The same tensors to the byte; returns them."""
    (expected, their_metadata), (found, our_metadata) = stored(theirs), stored(ours)
    assert sorted(found) == sorted(expected)
    assert {name for name in found if found[name] != expected[name]} == set()
    assert our_metadata == their_metadata
    return found


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("case", [TIED, BIASED], ids=["tied", "untied, biased"])
def test_names_dtypes_and_bytes(tmp_path, case, cast):
    CASTS[cast](parity.make_model(case)).save_pretrained(tmp_path / "theirs")
    checkpoint = load(tmp_path / "theirs")
    save(tmp_path / "ours", checkpoint.config, checkpoint.params, attributes=checkpoint.attributes)
    ours = assert_saved_alike(tmp_path / "theirs", tmp_path / "ours")
    assert ("lm_head.weight" in ours) is not case.tied
    if cast == "mixed":
        assert len({dtype for dtype, _, _ in ours.values()}) == (2 if case.tied else 3)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["dtype"] == checkpoint.attributes["dtype"]


def index_of(directory):
    """The index of three files, each of which is there."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = {path.name for path in directory.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) == 3
    return index


@pytest.mark.parametrize("name", FAMILIES)
def test_three_shards_in_bfloat16(tmp_path, name):
    """Names (an expert's own, say), shapes and bytes in each family, and an index over three files that both read."""
    case = parity.CASES[name]
    model = parity.make_model(case).bfloat16()
    model.save_pretrained(tmp_path / "whole")
    limit = int(0.45 * (tmp_path / "whole" / "model.safetensors").stat().st_size)  # two full files, and a rest
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    whole, checkpoint = load(tmp_path / "whole"), load(tmp_path / "theirs")
    assert whole.config == checkpoint.config
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.params, checkpoint.params))
    save(
        tmp_path / "ours", checkpoint.config, checkpoint.params, attributes=checkpoint.attributes,
        model_type=case.model_type, shard_bytes=limit,
    )  # fmt: skip
    assert_saved_alike(tmp_path / "theirs", tmp_path / "ours")
    indices = [
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("theirs", "ours")
    ]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
    assert indices[0]["weight_map"].keys() == indices[1]["weight_map"].keys()
    for side, index in zip(("theirs", "ours"), indices, strict=True):
        assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / side).glob("*.safetensors")}
        assert len(set(index["weight_map"].values())) == 3


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9], ids=["shards", "one file"])
@pytest.mark.parametrize("name", parity.CASES)
def test_transformers_reads_ours(oracle, tmp_path, name, shard_bytes):
    """From parameters to a directory to transformers: the same tensors to the bit, the same logits."""
    built = oracle(name)
    family = built.case.model_type  # one without its switches would be saved as the simplest that can express it
    directory = save(tmp_path / "ours", built.config, built.params, model_type=family, shard_bytes=shard_bytes)
    assert (directory / "model.safetensors.index.json").exists() is (shard_bytes == 50_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    assert type(model) is type(built.model)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = built.model.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    read = parity.Oracle(built.case, model, built.config, built.params, built.tokens, built.logits)
    logits = parity.reference_logits(read).detach().numpy()
    assert np.abs(logits - built.logits)[built.valid].max() / built.deviation <= parity.TOLERANCE["logits"]


def test_gpt2_as_it_is_published_has_names_without_a_prefix(tmp_path):
    """And masks among its tensors."""
    model = parity.make_model(parity.CASES["gpt2"])
    model.save_pretrained(tmp_path / "with")
    named = load(tmp_path / "with")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del bare["lm_head.weight"]
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 144, 144).tril() for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    (tmp_path / "bare").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in bare.items()}, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "with" / "config.json").read_bytes())
    read = load(tmp_path / "bare")
    assert read.config == named.config
    assert jax.tree.all(jax.tree.map(np.array_equal, read.params, named.params))


def test_our_loader_refuses_a_shard_of_theirs_that_is_missing(tmp_path):
    parity.make_model(TIED).save_pretrained(tmp_path, max_shard_size="50KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        load(tmp_path)
