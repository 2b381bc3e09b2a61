"""PEFT's files: what is written is read again, for every family; merged on export, beside a loaded model; refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxfw
from jaxfw.core.errors import InputError, RunError
from jaxfw.core.mesh import make_mesh
from jaxfw.models import DecoderConfig, MoEConfig, init, stack_layers
from jaxfw.models.lora import LoRAConfig, adapt, init_adapters, merge
from jaxfw.ops.quant import Quantised
from jaxfw.weights import load, load_adapters, save_adapters
from jaxfw.weights.__main__ import main
from jaxfw.weights.adapters import suffixes
from tests.model_directories import equal

LLAMA = DecoderConfig(vocab=320, width=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=8, positions=64)
GPT2 = dataclasses.replace(
    LLAMA, kv_heads=4, tie_embeddings=True, rope=None, learned_positions=True, norm="layer", norm_eps=1e-5,
    activation="gelu_tanh", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
# The first layer is dense; experts beside shared ones in the second.
MIXED = dataclasses.replace(
    LLAMA, qkv_bias=True, moe=MoEConfig(experts=4, per_token=2, ffn=16, shared=24, shared_gate=True, first=1, every=2)
)
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.1, targets="all")
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"


def numbers(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), shapes)


def shapes_of(config):
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def make(config, lora=LORA):
    """Adapters whose every number is another."""
    return numbers(jax.eval_shape(lambda: init_adapters(lora, shapes_of(config), jax.random.key(0))))


def written(directory):
    """The tensors and the fields of a directory."""
    return load_file(directory / "adapter_model.safetensors"), json.loads(
        (directory / "adapter_config.json").read_text()
    )


def rewrite(directory, change):
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def set_fields(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def saved(tmp_path):
    return save_adapters(tmp_path / "adapter", LLAMA, make(LLAMA), LORA)


# --- round trips


@pytest.mark.parametrize("targets", ["qv", "attention", "all", r"layers_1/(attn/o|mlp/up)/kernel"])
@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXED], ids=["llama", "gpt2", "mixture"])
def test_what_is_saved_is_loaded(tmp_path, config, targets):
    lora = dataclasses.replace(LORA, targets=targets)
    if config is MIXED and "mlp" in targets:
        lora = dataclasses.replace(lora, targets=r"layers_1/(attn/o|moe/shared/up|moe/shared_gate)/kernel")
    adapters = make(config, lora)
    found, again = load_adapters(save_adapters(tmp_path / "a", config, adapters, lora), config)
    assert equal(found, adapters)
    assert again.paths(shapes_of(config)) == lora.paths(shapes_of(config))
    assert dataclasses.replace(again, targets="") == dataclasses.replace(lora, targets="")


def test_names_and_layout(saved):
    tensors, fields = written(saved)
    ours = make(LLAMA)["layers_0"]["attn"]["q"]["kernel"]
    assert np.array_equal(tensors[f"{PREFIX}{QUERY}.lora_A.weight"], ours["a"].T)
    assert np.array_equal(tensors[f"{PREFIX}{QUERY}.lora_B.weight"], ours["b"].T)
    assert len(tensors) == 2 * 2 * 7
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"], fields["use_rslora"]) == (4, 8, 0.1, False)
    assert sorted(fields["target_modules"]) == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {} and fields["fan_in_fan_out"] is False


def test_kernels_that_share_a_module_share_its_ranks(tmp_path):
    """Of GPT-2's c_attn, q and v are adapted: ranks of both, below each other, and no part for k."""
    lora = dataclasses.replace(LORA, rank_stabilised=True, targets="qv")
    tensors, fields = written(save_adapters(tmp_path / "a", GPT2, make(GPT2, lora), lora))
    a, b = (tensors[f"{PREFIX}transformer.h.0.attn.c_attn.{name}.weight"] for name in ("lora_A", "lora_B"))
    assert a.shape == (8, 32) and b.shape == (96, 8) and fields["fan_in_fan_out"] is True
    q, v = (make(GPT2, lora)["layers_0"]["attn"][x]["kernel"] for x in "qv")
    assert fields["rank_pattern"]["transformer.h.0.attn.c_attn"] == 8
    scale = fields["alpha_pattern"]["transformer.h.0.attn.c_attn"] / 8**0.5
    assert scale == pytest.approx(lora.scale)
    expected = np.concatenate([q["a"] @ q["b"], np.zeros((32, 32)), v["a"] @ v["b"]], axis=1)
    np.testing.assert_allclose((b @ a).T, expected, atol=1e-6)


def test_a_common_side_is_written_once(tmp_path):
    """As PEFT trains c_attn: one lora_A for queries, keys and values."""
    lora = dataclasses.replace(LORA, targets=r"layers_\d+/attn/[qkv]/kernel")
    adapters = make(GPT2, lora)
    for layer in adapters.values():
        for part in "kv":
            layer["attn"][part]["kernel"]["a"] = layer["attn"]["q"]["kernel"]["a"]
    directory = save_adapters(tmp_path / "a", GPT2, adapters, lora)
    tensors, fields = written(directory)
    assert tensors[f"{PREFIX}transformer.h.1.attn.c_attn.lora_A.weight"].shape == (4, 32)
    assert fields["rank_pattern"] == {}
    assert equal(load_adapters(directory, GPT2)[0], adapters)
    rewrite(directory, dict)  # without our metadata, as PEFT writes it
    assert equal(load_adapters(directory, GPT2)[0], adapters)


def test_half_precision_is_read_as_float32(saved):
    rewrite(saved, lambda tensors: {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()})
    found, _ = load_adapters(saved, LLAMA)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), make(LLAMA))
    assert equal(found, expected)


def test_onto_a_mesh(saved):
    mesh = make_mesh(tensor=1)
    found, _ = load_adapters(saved, LLAMA, mesh=mesh)
    assert equal(found, make(LLAMA)) and jax.tree.leaves(found)[0].sharding.mesh == mesh


def test_ends_of_names():
    known = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.10.attn.c_proj", "h.10.mlp.c_proj"]
    assert suffixes(known, known) == ["c_proj"]
    assert suffixes([known[0], known[2]], known) == ["attn.c_proj"]
    assert suffixes([known[0]], known) == ["0.attn.c_proj"]


# --- export and generation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from jaxfw.data import train_bpe
    from jaxfw.generate.lm import LM

    tokenizer = train_bpe([json.__doc__ or ""], vocab_size=320)
    params = numbers(shapes_of(LLAMA), seed=1)
    return LM(LLAMA, params, tokenizer, (tokenizer.eos_id,)).save(tmp_path_factory.mktemp("lora") / "model")


def test_export_merges(model, saved, tmp_path, capsys):
    assert main(["export", str(model), str(tmp_path / "merged"), f"--adapter={saved}"]) == 0
    base, merged = load(model), load(tmp_path / "merged")
    expected = merge(base.params, make(LLAMA), LORA)
    assert merged.config == base.config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged.params, expected)
    differs = jax.tree.map(lambda a, b: not np.array_equal(a, b), base.params, merged.params)
    assert sum(jax.tree.leaves(differs)) == 14
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_export_merges_in_float32(model, saved, tmp_path):
    words = ["export", str(model), str(tmp_path / "half"), f"--adapter={saved}", "--param-dtype=bfloat16"]
    assert main(words) == 0
    expected = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), merge(load(model).params, make(LLAMA), LORA)
    )  # rounded once
    found = load(tmp_path / "half").params
    same = [np.mean(np.asarray(a == b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)]
    assert min(same) > 0.99


def test_a_loaded_model_has_its_adapter_beside_it(model, saved):
    plain = jaxfw.load(model)
    m = jaxfw.load(model, adapter=saved, quantise="int4")
    kernel = m.params["layers_0"]["attn"]["q"]["kernel"]
    assert isinstance(kernel.kernel, Quantised) and kernel.key is None
    expected = dataclasses.replace(m, params=adapt(jaxfw.load(model, quantise="int4").params, make(LLAMA), LORA))
    text = "a lightweight data interchange format"
    assert np.array_equal(m.logprobs(text), expected.logprobs(text))
    assert np.abs(m.logprobs(text) - plain.logprobs(text)).max() > 1e-2
    assert m.generate("JSON", max_new_tokens=4) == expected.generate("JSON", max_new_tokens=4)
    with pytest.raises(InputError, match=r"have adapters beside them .layers_0/attn/./kernel and 13 more"):
        jaxfw.load(model, adapter=saved).save(saved.parent / "new")


# --- refusals


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not read, only 'LORA'"),
        ({"use_dora": True}, "use_dora=True is not understood"),
        ({"bias": "lora_only"}, "bias='lora_only' is not understood"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is not understood"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters="),
        ({"something_new": {"deep": 1}}, "something_new={'deep': 1} is not understood"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' trains beside a changed base model"),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 2}}, "self_attn.q_proj by 0.5 and others by 2"),
        ({"r": 5}, "down_proj.lora_A is [4, 48], wanted [5, 48]"),
        ({"r": "many"}, "r='many' must be a number"),
        ({"lora_alpha": 0}, "lora.alpha=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_fields_that_are_not_understood_are_named(saved, fields, message):
    set_fields(saved, **fields)
    with pytest.raises(InputError) as caught:
        load_adapters(saved, LLAMA)
    assert message in str(caught.value), str(caught.value)


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(n in name for n in names)}


@pytest.mark.parametrize(
    "change, message",
    [
        (without(f"{QUERY}.lora_B"), f"missing: {QUERY}.lora_B"),
        (without(QUERY), f"missing: {QUERY}."),
        (lambda t: t | {f"{PREFIX}lm_head.{x}.weight": np.ones((4, 4), np.float32) for x in ("lora_A", "lora_B")},
         "unexpected: lm_head"),
        (lambda t: t | {f"{PREFIX}{QUERY}.lora_magnitude_vector": np.ones(4, np.float32)}, "lora_magnitude_vector"),
        (lambda t: t | {f"{PREFIX}{QUERY}.lora_B.weight": np.ones((8, 4), np.float32)}, "is [8, 4], wanted [32, 4]"),
        (lambda t: t | {f"{PREFIX}{QUERY}.lora_A.weight": np.full((4, 32), np.nan, np.float32)}, "are not finite"),
        (lambda t: t | {f"{PREFIX}{QUERY}.lora_A.weight": np.ones((4, 32), np.int8)}, "(I8), which are not read"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(InputError) as caught:
        load_adapters(saved, LLAMA)
    assert message in str(caught.value), str(caught.value)


def test_files_that_are_missing_or_damaged_are_named(saved, model, tmp_path):
    for directory, message in ((model, "holds a model, not an adapter"), (tmp_path / "no", "is no adapter")):
        with pytest.raises(InputError, match=message):
            load_adapters(directory, LLAMA)
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_adapters(saved, LLAMA)
    path.rename(saved / "adapter_model.bin")
    with pytest.raises(InputError, match=r"convert adapter_model.bin, which is pickled"):
        load_adapters(saved, LLAMA)


def test_adapters_of_another_model_are_named(saved):
    with pytest.raises(InputError, match=r"does not fit the model: .*is this the adapter's own base model"):
        load_adapters(saved, GPT2)
    with pytest.raises(InputError, match=r"down_proj.lora_B is \[32, 4\], wanted \[16, 4\]"):
        load_adapters(saved, dataclasses.replace(LLAMA, width=16))


def test_what_cannot_be_saved_is_named(saved, tmp_path):
    with pytest.raises(InputError, match="exists and is not empty"):
        save_adapters(saved, LLAMA, make(LLAMA), LORA)
    with pytest.raises(InputError, match=r"layers/attn/k/kernel, which the model lacks: unstack_layers\(adapters\)"):
        save_adapters(tmp_path / "a", LLAMA, stack_layers(make(LLAMA)), LORA)
    with pytest.raises(InputError, match=r"layers_1/.*, which the model lacks: give the model's own config"):
        save_adapters(tmp_path / "a", dataclasses.replace(LLAMA, layers=1), make(LLAMA), LORA)
    with pytest.raises(InputError, match=r"fits a kernel \[32, 16\], the model has \[16, 16\]"):
        save_adapters(tmp_path / "a", dataclasses.replace(LLAMA, width=16), make(LLAMA), LORA)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        save_adapters(tmp_path / "file" / "a", LLAMA, make(LLAMA), LORA)
    assert not list(tmp_path.glob(".*partial*"))


def test_inspect_says_an_adapter_and_what_to_do(saved, capsys):
    assert main(["inspect", str(saved)]) == 2
    said = capsys.readouterr().err
    assert "holds an adapter" in said and "jaxfw.load(BASE, adapter=...)" in said and "--adapter=" in said


def test_workdirs_of_adapters_are_understood(saved, model, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    saved.rename(workdir / "adapter")
    assert equal(load_adapters(workdir, LLAMA)[0], make(LLAMA))
    assert main(["export", str(workdir), str(tmp_path / "new")]) == 2
    assert f"give its base model, and --adapter={workdir}" in capsys.readouterr().err
