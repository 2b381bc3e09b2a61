"""`ExpertParallel` on eight devices: run by tests/test_expert_parallel.py in a process that has them."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

pytest.register_assert_rewrite("tests.experts_contract")

from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.core.mesh import make_mesh  # noqa: E402
from jaxfw.models.routing import Dense, ExpertChoice, ExpertParallel, Sorted, TokenChoice, TokenRoute  # noqa: E402
from jaxfw.models.routing.feed_forward import expert_ffn  # noqa: E402
from jaxfw.ops import routing  # noqa: E402
from tests.experts_contract import (  # noqa: E402
    FAST_TO_COMPILE,
    ExpertsContract,
    assert_near,
    context,
    draw,
    kept_by_loop,
    mask,
    params,
    run_back,
    token_route,
)

B, T, D, F = 8, 5, 6, 8
ROWS = ("data", "fsdp", "expert")


class OnMesh(ExpertsContract):
    sizes: dict

    def mesh(self):
        return jax.set_mesh(make_mesh(**self.sizes))


class TestExpertAxisOfFour(OnMesh):
    experts = ExpertParallel()
    sizes = {"data": 2, "expert": 4}  # noqa: RUF012
    groups = 8


class TestDrops(OnMesh):
    experts = ExpertParallel(0.7)
    sizes = {"data": 2, "expert": 2, "tensor": 2}  # noqa: RUF012
    groups = 4


LAYOUTS = [
    (ExpertParallel(0.7, group=8), {"fsdp": 2, "expert": 2, "tensor": 2}, 8, ("token",)),
    (ExpertParallel(0.9), {"expert": 8}, 8, ("token", "slot", "soft")),  # four experts and four that are added
    (Sorted(0.7), {"data": 2, "expert": 2, "tensor": 2}, 4, ("token",)),
]


@pytest.mark.parametrize("experts, sizes, groups, kinds", LAYOUTS, ids=repr)
def test_other_layouts(experts, sizes, groups, kinds):
    contract = OnMesh()
    contract.experts, contract.sizes, contract.groups, contract.kinds = experts, sizes, groups, kinds
    contract.test_outputs_and_all_gradients_equal_the_reference()
    contract.test_statistics_count_valid_assignments()
    contract.test_padding_changes_nothing()


# --- what the compiled program moves


def weights(E):
    rng = np.random.default_rng(1)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def placed(mesh, params, x, route, valid, cotangent):
    """As a run lays them out: experts over `expert`, F over `tensor`, rows over the rest."""
    specs = {"gate": Spec("expert", None, "tensor"), "up": Spec("expert", None, "tensor")}
    specs["down"] = Spec("expert", "tensor", None)
    held = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    rows = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, Spec(ROWS))), (x, route, valid, cotangent)
    )
    return held, *rows


def collectives(text):
    """{kind: [elements of all results]} of a compiled program."""
    found, kinds = {}, "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    for results, kind in re.findall(rf"^.* = (.*?) ({kinds})(?:-start)?\(", text, flags=re.M):
        shapes = re.findall(r"\w+\[([\d,]*)\]", results)
        sizes = (math.prod(int(size) for size in shape.split(",") if size) for shape in shapes)
        found.setdefault(kind, []).append(sum(sizes))
    return found


@pytest.mark.parametrize("sizes", [{"data": 2, "expert": 4}, {"data": 2, "expert": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("capacity", [None, 1.25])
def test_tokens_travel_and_weights_stay(sizes, capacity):
    """Equal to one device; every device ends with its own experts' gradients; nothing gathers the experts."""
    E, mesh = 8, make_mesh(**sizes)
    route = token_route(np.argsort(draw(B, T, E, seed=6), axis=-1)[..., :2])
    inputs = weights(E), draw(B, T, D), route, mask(), draw(B, T, D, seed=8)
    with jax.set_mesh(mesh):
        args = placed(mesh, *inputs)
        compiled = run_back.lower(ExpertParallel(capacity), *args).compile()
        y, stats, gradients = compiled(*args)
    alone = run_back(Sorted(capacity, group=8 // sizes.get("tensor", 1)), *inputs)
    inside = mask()[..., None]
    assert_near(np.where(inside, y, 0), np.where(inside, alone[0], 0), "output")
    for name in inputs[0]:
        assert_near(gradients[0][name], alone[2][0][name], name)
        assert gradients[0][name].sharding.is_equivalent_to(args[0][name].sharding, 3), name
    assert_near(gradients[1], alone[2][1], "x")
    assert_near(gradients[2]["weights"], alone[2][2]["weights"], "route")
    assert jax.device_get(stats) == jax.device_get(alone[1])
    moved = collectives(compiled.as_text())
    assert len(moved["all-to-all"]) >= 4, "there and back, forward and backward"
    shard = E * D * F // sizes["expert"] // sizes.get("tensor", 1)
    assert max(moved.get("all-gather", [0])) < shard, moved
    # Summed are what a device holds: gradients of its three matrices over data, its slots over tensor.
    assert max(moved["all-reduce"]) <= 3 * max(shard, *moved["all-to-all"]), moved


def test_experts_that_are_full_run_one_after_the_other(monkeypatch):
    """Everything goes to two experts of 16: every device runs one of the two that it holds at a time."""
    E, T, mesh, forms = 16, 40, make_mesh(expert=8), set()

    def one_at_a_time(params, x):
        forms.add(len(x))
        return expert_ffn(params, x) if len(x) == 1 else jnp.full_like(x, jnp.nan)

    monkeypatch.setattr("jaxfw.models.routing.feed_forward.expert_ffn", one_at_a_time)
    valid = mask([40, 3, 17, 0, 39, 40, 1, 20], width=T)
    inputs = weights(E), draw(B, T, D), token_route([5, 11], width=T), valid, draw(B, T, D, seed=8)
    with jax.set_mesh(mesh):
        y, stats, gradients = jax.device_get(run_back(ExpertParallel(), *placed(mesh, *inputs)))
    assert forms == {1, 2} and np.all(np.isfinite(y)), "the form that runs both at once is there and was not taken"
    monkeypatch.undo()
    alone = run_back(Dense(), *inputs)
    assert int(stats.dropped) == 0 and int(stats.kept) == 2 * valid.sum()
    assert_near(np.where(valid[..., None], y, 0), np.where(valid[..., None], alone[0], 0), "output")
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone[2]), strict=True):
        assert_near(found, wanted, "gradients")


def test_drops_are_those_of_the_loop():
    """Which assignments were dropped, seen in the answers: experts that return their input, one-hot weights."""
    E, mesh = 4, make_mesh(data=2, expert=4)
    route, run = token_route([2, 0]), jax.jit(ExpertParallel(0.9), compiler_options=FAST_TO_COMPILE)
    for j in range(2):
        only = TokenRoute(route.ids, np.eye(2, dtype=np.float32)[j] * np.ones((B, T, 1), np.float32))
        with jax.set_mesh(mesh):
            y, _ = run(weights(E), draw(B, T, D), only, context(mask()))
        kept = kept_by_loop(route.ids, mask(), 0.9, groups=8)[..., j]
        np.testing.assert_array_equal(np.any(np.asarray(y) != 0, axis=-1) & mask(), kept)


@pytest.mark.parametrize("router", [TokenChoice(2), ExpertChoice(1.5, groups=8)], ids=str)
def test_router_and_experts_together(router):
    """Loss, losses of the router and the router's gradient equal one device's; the loads of all shards count."""
    E, mesh = 4, make_mesh(data=2, expert=4)
    kernel, x, valid, cotangent = draw(D, E, seed=2), draw(B, T, D), mask(), draw(B, T, D, seed=8)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_TO_COMPILE)
    def losses(experts, kernel, experts_params, x, valid):
        def total(kernel):
            route, aux = router({"kernel": kernel}, x, context(valid))
            y, stats = experts(experts_params, x, route, context(valid))
            return jnp.sum(y * cotangent) + sum(aux.losses.values(), jnp.float32(0)), (aux.losses, aux.load, stats)

        return jax.value_and_grad(total, has_aux=True)(kernel)

    with jax.set_mesh(mesh):
        params, x_held, _, valid_held, _ = placed(mesh, weights(E), x, token_route(), valid, cotangent)
        args = ExpertParallel(), kernel, params, x_held, valid_held
        found = losses(*args)
        assert "all-gather" not in collectives(losses.lower(*args).compile().as_text()), "a router is local to its rows"
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(losses(Sorted(), kernel, weights(E), x, valid)), strict=True
    ):
        assert_near(a, b, "router and experts")


def test_ties_go_to_the_lower_expert_on_a_mesh_too():
    scores = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.4, 0.1]])
    with jax.set_mesh(make_mesh(data=8)):
        assert jax.jit(routing.choose, static_argnums=1)(scores, 3).tolist() == [[0, 1, 2], [1, 2, 0]]


def test_refusals_name_the_remedy():
    experts, route, x = ExpertParallel(), token_route(), draw(B, T, D)
    with pytest.raises(InputError, match=r"ExpertParallel.*axis 'expert'.*set_mesh"):
        experts(params(), x, route, context(mask()))
    with jax.set_mesh(make_mesh(expert=8)):
        few = token_route(batch=3)
        with pytest.raises(InputError, match=r"3 rows of the batch.*8 shards"):
            experts(params(), x[:3], few, context(mask()[:3]))
        with pytest.raises(InputError, match=r"12 groups.*8 shards"):
            ExpertParallel(1.0, group=12)(params(), x, route, context(mask()))
    with pytest.raises(InputError, match="group='global'"):
        ExpertParallel(1.0, group="global")
