"""Of mixtures: no ties in the cases of parity, and config.json files that transformers reads alike."""

import copy
import json

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from experiments.parity import moe  # noqa: E402
from jaxfw.models.hub_config import IRRELEVANT, NEUTRAL  # noqa: E402
from jaxfw.models.presets import preset  # noqa: E402
from jaxfw.weights.families import family  # noqa: E402
from tests.published_mixtures import PUBLISHED, in_version_5  # noqa: E402

KNOWN_THERE = [name for name in PUBLISHED if PUBLISHED[name]["model_type"] != "deepseek"]


@pytest.mark.parametrize("name", [case.name for case in moe.CASES])
def test_no_choice_is_a_tie(oracle, name):
    assert moe.margin(oracle(name)) >= moe.MARGIN


def config_there(attributes):
    attributes = copy.deepcopy(attributes)
    return transformers.AutoConfig.for_model(attributes.pop("model_type"), **attributes)


def read(attributes):
    dtypes = {"param_dtype": "bfloat16", "dtype": "bfloat16", "softmax_dtype": "float32"}
    return family(attributes["model_type"]).read_config(attributes, **dtypes)


@pytest.mark.parametrize("name", KNOWN_THERE)
def test_version_5_writes_what_the_tests_without_it_assume(name):
    theirs = json.loads(config_there(PUBLISHED[name]).to_json_string(use_diff=False))
    assert read(theirs) == preset(name)
    ours, passed_over = in_version_5(PUBLISHED[name]), IRRELEVANT | NEUTRAL.keys()
    assert {key: theirs.get(key) for key in ours.keys() - passed_over} == {
        key: value for key, value in ours.items() if key not in passed_over
    }


@pytest.mark.parametrize("name", KNOWN_THERE)
def test_transformers_reads_what_we_write(name):
    written = json.loads(json.dumps(family(PUBLISHED[name]["model_type"]).write_config(preset(name))))
    ours, theirs = config_there(written).to_dict(), config_there(PUBLISHED[name]).to_dict()
    odd = IRRELEVANT | {"head_dim", "sliding_window"}
    assert {key: ours[key] for key in theirs.keys() - odd} == {key: theirs[key] for key in theirs.keys() - odd}
    head_dim = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    assert ours["head_dim"] == head_dim
    assert (ours.get("sliding_window") or None) == (theirs.get("sliding_window") or None)


@pytest.mark.parametrize("model_type", sorted({PUBLISHED[name]["model_type"] for name in KNOWN_THERE}))
def test_attributes_that_are_absent_have_its_defaults(model_type):
    needed = {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 32,
        "num_hidden_layers": 2, "vocab_size": 100,
    }  # fmt: skip
    theirs = json.loads(config_there(needed).to_json_string(use_diff=False))
    assert read(needed) == read(theirs)
