"""Adapters on a mesh of four devices beside one device."""

import dataclasses
import json

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.sharding import shardings
from jaxfw.models import MoEConfig, init, stack_layers
from jaxfw.models.lora import LoRAConfig, init_adapters
from jaxfw.models.sharding import decoder_rules
from tests.mesh_lora import CONFIG, LORA
from tests.processes import environment, run_together


@pytest.fixture(scope="module")
def report():
    (ended,) = run_together((["-m", "tests.mesh_lora"], environment(devices=4)), timeout=150)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.slow
def test_steps_on_a_mesh_are_those_of_one_device(report):
    assert report["loss"] < 1e-5 and report["params"] < 1e-5, report
    assert report["moved"] > 1e-2


@pytest.mark.slow
def test_adapters_lie_as_their_kernels_do(report):
    assert report["laid_out"]
    assert report["specs"] == {"q/a": ["fsdp"], "q/b": [None, "tensor"], "o/a": ["tensor"], "o/b": [None, "fsdp"]}


MIXED = dataclasses.replace(CONFIG, moe=MoEConfig(experts=4, per_token=2, ffn=16, shared=8, shared_gate=True))


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["dense", "mixture"])
def test_every_adapter_has_a_rule(config, stacked):
    def shapes():
        params = init(config, jax.random.key(0))
        params = stack_layers(params) if stacked else params
        return init_adapters(LoRAConfig(rank=4, targets="all"), params, jax.random.key(0))

    adapters = jax.eval_shape(shapes)
    places = shardings(decoder_rules(config), abstract_mesh(fsdp=2, tensor=2), adapters)
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(adapters), jax.tree.leaves(places), strict=True):
        words = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        meets_residual = (words[-3] in ("o", "down")) == (words[-1] == "b")  # that axis lies over fsdp
        axis = leaf.ndim - (2 if words[-1] == "a" else 1)
        assert place.spec == P(*[None] * axis, "fsdp" if meets_residual else "tensor", *[None] * (leaf.ndim - axis - 1))


def test_heads_that_do_not_divide_are_not_cut():
    adapters = jax.eval_shape(lambda: init_adapters(LORA, init(CONFIG, jax.random.key(0)), jax.random.key(0)))
    attn = shardings(decoder_rules(CONFIG), abstract_mesh(tensor=4), adapters)["layers_0"]["attn"]
    assert attn["q"]["kernel"]["b"].spec == P(None, "tensor") and attn["k"]["kernel"]["b"].spec == P(None, None)
