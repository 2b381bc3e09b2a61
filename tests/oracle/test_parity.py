"""Logits equal transformers', in every family, kind of RoPE and grouping; and every planted fault is seen."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

from experiments import parity  # noqa: E402
from jaxfw.models import decoder, forward  # noqa: E402
from jaxfw.models.cache import FullCache  # noqa: E402
from jaxfw.models.hub_config import read_rope  # noqa: E402
from jaxfw.ops import rope as rope_module  # noqa: E402
from jaxfw.ops.rope import KINDS, inverse_frequencies  # noqa: E402
from jaxfw.weights.families import FAMILIES  # noqa: E402

TOLERANCE = parity.TOLERANCE["logits"]
FAULTS = {fault.name: fault for fault in parity.FAULTS if fault.shows_in == "logits"}


def test_cases_cover_what_the_gate_names():
    assert {case.model_type for case in parity.CASES.values()} == FAMILIES.keys() - {"deepseek"}, "it is not there"
    cases = [case for case in parity.CASES.values() if case.model_type == "llama"]
    assert {case.rope["rope_type"] for case in cases} == set(KINDS)
    heads = [(case.attributes["num_attention_heads"], case.attributes["num_key_value_heads"]) for case in cases]
    assert {heads // kv_heads for heads, kv_heads in heads} == {1, 3, 4, 7}
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert {case.attributes.get(name, False) for case in cases} == {False, True}
    for case in parity.CASES.values():
        assert min(case.lengths) < max(case.lengths), "padded rows"
        before = case.rope.get("original_max_position_embeddings", case.attributes.get("max_position_embeddings"))
        assert case.rope.get("rope_type", "default") in ("default", "linear") or max(case.lengths) >= 4 * before
    assert max(max(case.lengths) for case in cases) > 512, "longer than one block of queries"
    assert len({fault.name for fault in parity.FAULTS}) == len(parity.FAULTS) >= 49 + 25


def test_families_are_compared_beyond_their_windows(oracle):
    windowed = set()
    for name, case in parity.CASES.items():
        if case.attributes.get("sliding_window"):
            window = oracle(name).config.window
            assert max(case.lengths) > 4 * window
            windowed.add(case.model_type)
    assert {"mistral", "qwen2", "qwen3", "mixtral"} <= windowed


@pytest.mark.parametrize("name", parity.CASES)
def test_logits(oracle, name):
    built = oracle(name)
    assert built.deviation >= 1
    assert parity.logits_error(built) <= TOLERANCE


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(oracle, name):
    error = parity.fault_error(oracle(FAULTS[name].case), FAULTS[name])
    assert error >= parity.VISIBLE * TOLERANCE


def test_a_planted_fault_leaves_no_trace(oracle):
    before = (decoder.rotate, rope_module._llama3)
    parity.fault_error(oracle("default"), FAULTS["rotation left out"])
    parity.fault_error(oracle("llama3"), FAULTS["llama3: hard switch for the smooth band"])
    assert (decoder.rotate, rope_module._llama3) == before
    assert parity.logits_error(oracle("default")) <= TOLERANCE


@pytest.fixture(scope="module")
def sharded(oracle):
    """The first case of each family on a mesh of four devices."""
    names = parity.first_of_families().values()
    return {row["case"]: row for row in parity.sharded_errors({name: oracle(name) for name in names})}


@pytest.mark.parametrize("name", parity.first_of_families().values())
def test_logits_on_a_mesh(sharded, name):
    assert sharded[name]["error"] <= TOLERANCE
    assert sharded[name]["bytes_share"] < 0.3, "a device holds a quarter, and what is small"


@pytest.mark.parametrize("name", ["default", "dynamic", "yarn", "llama3, biased", "mistral", "qwen2, windows",
                                  "qwen3, windows", "gpt2", "mixtral, window", "olmoe"])  # fmt: skip
def test_decoding_with_a_cache(oracle, name):
    """Token by token behind a prompt, transformers keeps each cached key's rotation, as we do; `dynamic` moves on."""
    built = oracle(name)
    prompt, T = 20, 44  # `dynamic` stretches from 32 on
    tokens = built.tokens[:1, :T]
    parity.restart(built.model)
    theirs, past = [], None
    with torch.no_grad():
        for piece in np.split(tokens, range(prompt, T), axis=1):
            out = built.model(input_ids=torch.from_numpy(piece).long(), past_key_values=past, use_cache=True)
            theirs.append(out.logits.numpy())
            past = out.past_key_values

    run_forward = jax.jit(
        lambda tokens, cache: forward(built.config, built.params, tokens, policy=FullCache(), cache=cache, room=T)
    )
    ours, cache = [], None
    for piece in np.split(tokens, range(prompt, T), axis=1):
        out = run_forward(piece, cache)
        ours.append(np.asarray(out.logits))
        cache = out.cache
    ours, theirs = (np.concatenate(x, axis=1) for x in (ours, theirs))
    assert np.abs(ours - theirs).max() / theirs.std() <= TOLERANCE


PUBLISHED = {
    "Llama-2-7b": ({"rope_type": "default", "rope_theta": 1e4}, 128, 4096),
    "Llama-3-8B": ({"rope_type": "default", "rope_theta": 5e5}, 128, 8192),
    "Llama-3.1-8B": (
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 128, 131072),
    "Llama-3.2-1B": (
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, 64, 131072),
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}, 128, 16384),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 128, 2048),
    "Yarn-Llama-2-7b-64k": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 4096},
        128, 65536),
    "gpt-oss": (
        {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
         "original_max_position_embeddings": 4096, "truncate": False}, 64, 131072),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_at_published_sizes(name):
    """Within two units in the last place: torch's power function is not correctly rounded everywhere."""
    parameters, width, positions = PUBLISHED[name]
    config = transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=positions,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    rope = read_rope({"rope_parameters": parameters}, positions)
    ours = inverse_frequencies(rope, width)
    assert np.abs(ours.view(np.int32) - theirs.inv_freq.numpy().view(np.int32)).max() <= 2
    assert rope_module.attention_factor(rope) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("length", [2048, 2049, 8192])
def test_dynamic_frequencies_follow_the_length(length):
    parameters, width, positions = PUBLISHED["dynamic"]
    config = transformers.LlamaConfig(
        hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=positions,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    theirs(torch.zeros(1), torch.arange(length)[None])
    rope = read_rope({"rope_parameters": parameters}, positions)
    ours = rope_module._dynamic_frequencies(rope, width, jnp.asarray([length]))[0]
    np.testing.assert_allclose(np.asarray(ours), theirs.inv_freq.numpy(), rtol=4e-7)


def test_the_committed_report_is_of_these_cases_and_faults():
    report = json.loads(parity.RESULTS.read_text())
    assert report["ok"] and report["tolerance"] == parity.TOLERANCE
    assert [row["case"] for row in report["parity"]] == list(parity.CASES)
    assert [row["case"] for row in report["sharded"]] == list(parity.first_of_families().values())
    assert [row["fault"] for row in report["mutations"]] == [fault.name for fault in parity.FAULTS]
