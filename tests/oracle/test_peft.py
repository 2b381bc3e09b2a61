"""Adapters beside PEFT's own: each loads what the other saved and computes the same; so is merging, and beginning."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.oracle

from experiments import parity  # noqa: E402
from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.models import forward  # noqa: E402
from jaxfw.models.lora import LoRAConfig, adapt, init_adapters, merge  # noqa: E402
from jaxfw.weights import load, load_adapters, save_adapters  # noqa: E402
from jaxfw.weights.exporting import export  # noqa: E402

LORA = LoRAConfig(rank=4, alpha=8.0, targets="all")
# Of GPT-2, one module holds queries, keys and values; of the mixture, shared experts and attention are adapted.
CASES = ("llama3", "qwen2", "gpt2", "qwen2_moe", "mixtral")
SIZE = 0.05  # of the adapters' numbers: logits move by a few of their deviations, and do not lose digits by it
TOLERANCE = 1e-5
run = jax.jit(
    lambda config, params, tokens, lengths: forward(config, params, tokens, lengths=lengths).logits, static_argnums=0
)


def ours(oracle, params):
    return np.asarray(run(oracle.config, params, oracle.tokens, oracle.lengths))


def theirs(oracle, model):
    with torch.no_grad():
        return parity.case.reference_logits(dataclasses.replace(oracle, model=model)).numpy()


def error(oracle, found, wanted):
    return float(np.abs(found - wanted)[oracle.valid].max() / wanted[oracle.valid].std())


def make(oracle, lora=LORA):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapters(lora, oracle.params, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(SIZE * rng.standard_normal(x.shape), jnp.float32), shapes)


def base_of(name):
    """Transformers' model of a case, new: PEFT changes the one that it is given."""
    return parity.case.make_model(parity.CASES[name])


def trained_by_peft(name, **options):
    """A PEFT model of a case whose adapters count."""
    model = peft.get_peft_model(base_of(name), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    rng = np.random.default_rng(1)
    for key, tensor in model.named_parameters():
        if "lora_" in key:
            tensor.data.copy_(torch.from_numpy((SIZE * rng.standard_normal(tensor.shape)).astype(np.float32)))
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_ours(oracle, tmp_path, name):
    found = oracle(name)
    adapters = make(found)
    directory = save_adapters(tmp_path / "adapter", found.config, adapters, LORA)
    model = peft.PeftModel.from_pretrained(base_of(name), directory).eval()
    wanted = theirs(found, model)
    assert error(found, found.logits, wanted) > 0.1
    assert error(found, ours(found, adapt(found.params, adapters, LORA)), wanted) < TOLERANCE
    assert error(found, ours(found, merge(found.params, adapters, LORA)), wanted) < TOLERANCE
    names = {key for key, _ in model.named_parameters() if "lora_" in key}
    assert len(names) == len(jax.tree.leaves(adapters)) - (2 * 2 * found.config.layers if name == "gpt2" else 0)


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama3", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}),
        ("qwen2", {"target_modules": r".*layers\.1\.self_attn\.[qo]_proj"}),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("qwen2_moe", {"target_modules": ["k_proj", "shared_expert.up_proj", "shared_expert_gate"]}),
    ],
)
def test_we_load_pefts(oracle, tmp_path, name, options):
    found, model = oracle(name), trained_by_peft(name, **options)
    model.save_pretrained(tmp_path / "adapter")
    adapters, lora = load_adapters(tmp_path / "adapter", found.config)
    assert lora.rank_stabilised is options.get("use_rslora", False) and lora.rank == 4
    wanted = theirs(found, model)
    assert error(found, found.logits, wanted) > 0.1
    assert error(found, ours(found, adapt(found.params, adapters, lora)), wanted) < TOLERANCE


def test_pefts_merged_model_is_our_export(oracle, tmp_path):
    model = trained_by_peft("gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "adapter")
    base_of("gpt2").save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "ours", adapter=tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    found, wanted = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert found.config == wanted.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found.params, wanted.params)


def test_adapters_begin_as_pefts(oracle):
    found = oracle("llama3")
    model = peft.get_peft_model(base_of("llama3"), peft.LoraConfig(r=4, target_modules=["down_proj"]))
    a = np.concatenate([x.detach().numpy().ravel() for key, x in model.named_parameters() if "lora_A" in key])
    lora = LoRAConfig(rank=4, targets=r"layers_\d+/mlp/down/kernel")
    fresh = jax.tree.leaves(init_adapters(lora, found.params, jax.random.key(0)))
    mine = np.concatenate([np.ravel(leaf) for leaf in fresh if np.any(leaf)])
    assert mine.size == a.size
    assert np.abs(mine).max() == pytest.approx(np.abs(a).max(), rel=0.03)
    assert mine.std() == pytest.approx(a.std(), rel=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern and alpha_pattern scale"),
        ({"lora_bias": True}, "lora_bias=True"),
    ],
)
def test_what_peft_saves_and_we_do_not_read_is_named(oracle, tmp_path, options, message):
    trained_by_peft("llama3", target_modules=["q_proj", "v_proj"], **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        load_adapters(tmp_path / "adapter", oracle("llama3").config)


def test_every_field_that_peft_writes_is_known(tmp_path):
    """Of an ordinary adapter, in the form of the installed version."""
    trained_by_peft("llama3", target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(fields) > 20
    load_adapters(tmp_path / "adapter", parity.build(parity.CASES["llama3"]).config)
