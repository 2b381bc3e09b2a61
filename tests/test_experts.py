"""`Dense` and `Sorted` hold to the contract of experts, together with every router, and the contract notices faults."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.register_assert_rewrite("tests.experts_contract", "tests.router_contract")

from jaxfw.core.errors import InputError  # noqa: E402
from jaxfw.models.routing import (  # noqa: E402
    Dense,
    ExpertChoice,
    ExpertParallel,
    RouteContext,
    SlotRoute,
    SoftChoice,
    Sorted,
    TokenChoice,
    TokenRoute,
)
from jaxfw.models.routing.again import cond_again  # noqa: E402
from jaxfw.models.routing.feed_forward import expert_ffn  # noqa: E402
from tests.experts_contract import (  # noqa: E402
    FAST_TO_COMPILE,
    D,
    E,
    ExpertsContract,
    F,
    assert_near,
    context,
    draw,
    expected,
    kept_by_loop,
    mask,
    params,
    run_back,
    token_route,
)
from tests.router_contract import RouterContract  # noqa: E402

B, T = 8, 5


class TestDense(ExpertsContract):
    experts = Dense()
    kinds = ("token",)


class TestSorted(ExpertsContract):
    experts = Sorted()


class TestDenseDropsInGroups(ExpertsContract):
    experts = Dense(0.7, group=4)
    groups = 4


class TestSortedDropsInGroups(ExpertsContract):
    experts = Sorted(0.7, group=4)
    kinds = ("token",)
    groups = 4


# --- router and experts: the gradient of the router's parameters through the weights


def answers(experts, router, router_params, experts_params, x, valid, cotangent):
    route, _ = router(router_params, x, context(valid))
    y, _ = experts(experts_params, x, route, context(valid))
    return jnp.sum(jnp.where(valid[..., None], y * cotangent, 0)), route


ROUTERS = [
    TokenChoice(2), TokenChoice(1, renormalize=False), TokenChoice(2, "sigmoid"), ExpertChoice(1.5), SoftChoice(2)
]  # fmt: skip


@pytest.mark.parametrize(
    "router, experts",
    [*((router, Dense()) for router in ROUTERS), (ROUTERS[0], Sorted()), (ROUTERS[0], Sorted(0.7))],
    ids=repr,
)
def test_router_gradients_equal_finite_differences_in_float64(router, experts):
    """The route is drawn by numpy in float64 from the router's definition; choices and drops stay as they are."""
    valid, x, cotangent = mask(), draw(B, T, D), draw(B, T, D, seed=8)
    weights = {"kernel": draw(D, E * getattr(router, "slots", 1), seed=2)}
    if isinstance(router, SoftChoice):
        weights["scale"] = np.float32(1.5)
    back = jax.grad(answers, argnums=2, has_aux=True)
    back = jax.jit(back, static_argnums=(0, 1), compiler_options=FAST_TO_COMPILE)
    found, chosen = back(experts, router, weights, params(), x, valid, cotangent)

    def total(kernel):
        route = exact_route(router, chosen, kernel, x, valid)
        kept = kept_by_loop(route.ids, valid, experts.capacity) if isinstance(route, TokenRoute) else None
        y, _ = expected(params(), x, route, valid, cotangent, kept)
        return np.sum(np.where(valid[..., None], y * cotangent, 0))

    kernel, direction = weights["kernel"].astype(np.float64), draw(*weights["kernel"].shape, seed=11)
    for toward in (direction, np.eye(*kernel.shape)):
        slope = (total(kernel + 1e-5 * toward) - total(kernel - 1e-5 * toward)) / 2e-5
        assert np.sum(found["kernel"] * toward) == pytest.approx(slope, rel=2e-4)


def exact_route(router, chosen, kernel, x, valid):
    """The route's weights in float64; which tokens and experts, as `chosen`."""
    x = x.astype(np.float64)
    if isinstance(router, SoftChoice):
        h = 1.5 * np.einsum("btd,dr->btr", unit(x, -1), unit(kernel, 0))
        e = np.where(valid[..., None], np.exp(h), 0)
        dispatch, combine = e / np.maximum(e.sum(axis=1, keepdims=True), 1e-30), np.exp(h)
        parts = (dispatch, combine / combine.sum(axis=-1, keepdims=True))
        return type(chosen)(*(part.reshape(B, T, E, -1) for part in parts))
    e = np.exp(x @ kernel)
    probs = e / e.sum(axis=-1, keepdims=True)
    if isinstance(chosen, SlotRoute):
        tokens = np.asarray(chosen.tokens)
        weights = np.take_along_axis(probs.reshape(1, -1, E).swapaxes(1, 2), np.maximum(tokens, 0), axis=-1)
        return SlotRoute(tokens, weights)
    ids = np.asarray(chosen.ids)
    scores = e / (1 + e) if router.scores == "sigmoid" else probs
    weights = np.take_along_axis(scores, ids, axis=-1)
    return TokenRoute(ids, weights / weights.sum(axis=-1, keepdims=True) if router.renormalize else weights)


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


# --- dropless: a room, and blocks for every load


def many(E, seed=1):
    rng, shapes = np.random.default_rng(seed), {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def skewed(E, share, width=T):
    """Two choices among E experts, of which a `share` of the tokens has expert 7 first."""
    rng = np.random.default_rng(0)
    liking = rng.random((B, width, E))
    liking[..., 7] += np.where(rng.random((B, width)) < share, 2, 0)
    return token_route(np.argsort(-liking, axis=-1)[..., :2], width=width)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_load_computes_the_same(share):
    """From even loads to all tokens at one of sixteen experts, which fills three blocks."""
    x, cotangent, route = draw(B, T, D), draw(B, T, D, seed=8), skewed(16, share)
    y, stats, gradients = run_back(Sorted(), many(16), x, route, mask(), cotangent)
    wanted, wanted_stats, wanted_gradients = run_back(Dense(), many(16), x, route, mask(), cotangent)
    assert_near(np.where(mask()[..., None], y, 0), np.where(mask()[..., None], wanted, 0), "output")
    assert jax.device_get(stats) == jax.device_get(wanted_stats) and float(stats.dropped) == 0
    for found, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        assert_near(found, leaf, "gradient")


def test_work_follows_the_assignments(monkeypatch):
    """Rows that experts multiply, counted as they run: at most 2.5 an assignment, where `Dense` has eight."""
    rows = []

    def counted(params, x):
        jax.debug.callback(lambda: rows.append(x.shape[0] * x.shape[1] * x.shape[2]))
        return expert_ffn(params, x)

    monkeypatch.setattr("jaxfw.models.routing.feed_forward.expert_ffn", counted)
    width = 64
    valid, assignments = np.ones((B, width), bool), 2 * B * width
    # A function of its own, so that no trace from before the patch serves.
    run = jax.jit(lambda *args: Sorted()(*args, context(valid)), compiler_options=FAST_TO_COMPILE)
    for share, work in ((0.0, 1.5), (0.3, 2.5), (1.0, 2.5)):
        rows.clear()
        jax.block_until_ready(run(many(16), draw(B, width, D), skewed(16, share, width)))
        jax.effects_barrier()
        assert assignments <= sum(rows) <= work * assignments


def residual_bytes(function, *args):
    """What a gradient holds from the forward pass to the backward one."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_gradients_hold_the_operands_alone():
    """Not the activations of both forms: what remains is x, the parameters, and a few numbers an assignment."""
    x, route, experts, valid = draw(B, 64, D), token_route(width=64), many(16), np.ones((B, 64), bool)

    def run(params, x, weights):
        return Sorted()(params, x, TokenRoute(route.ids, weights), context(valid))[0]

    operands = x.nbytes + sum(leaf.nbytes for leaf in experts.values())
    one_number_an_assignment = 4 * route.ids.size
    assert residual_bytes(run, experts, x, route.weights) <= operands + 4 * one_number_an_assignment


def test_a_second_derivative_goes_through_the_choice():
    def slope(x):
        return jax.grad(lambda x: jnp.sum(cond_again((lambda x, _: x**3, lambda x, _: x), jnp.array(True), x, ())))(x)

    assert float(jax.grad(slope)(2.0)) == pytest.approx(12.0)


def test_a_decode_step_reads_the_experts_that_it_uses():
    """Few assignments among many experts: no product over all experts in the program, and the reference's numbers."""
    E, x, valid = 16, draw(2, 1, D), mask([1, 1], width=1)
    route, cotangent = token_route([[[5, 3]], [[3, 9]]], batch=2, width=1), draw(2, 1, D, seed=8)
    y, stats, gradients = run_back(Sorted(), many(E), x, route, valid, cotangent)
    wanted, _, derivatives = run_back(Dense(), many(E), x, route, valid, cotangent)
    assert_near(y, wanted, "output")
    for found, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(derivatives), strict=True):
        assert_near(found, leaf, "gradient")
    text = jax.jit(Sorted()).lower(many(E), x, route, context(valid)).as_text()
    products = re.findall(r"dot_general.*?: \(tensor<(\d+)x", text)
    assert products and set(products) == {"1"}
    assert int(stats.kept) == 4


def test_one_expert_is_a_plain_feed_forward():
    x, ones = draw(B, T, D), np.ones((B, T, 1), np.float32)
    one = {name: leaf[:1] for name, leaf in params().items()}
    plain = expert_ffn(one, jnp.asarray(x).reshape(1, -1, D)).reshape(x.shape)
    for experts in (Sorted(), Dense(), Sorted(1.0)):
        run = jax.jit(experts, compiler_options=FAST_TO_COMPILE)
        y, _ = run(one, x, TokenRoute(np.zeros((B, T, 1), np.int32), ones), context(np.ones((B, T), bool)))
        assert_near(y, plain, "one expert")


# --- small print


def test_experts_without_a_gate_are_plain_gelu():
    plain = {name: leaf for name, leaf in params().items() if name != "gate"}
    x = draw(E, 3, D)
    h = np.einsum("ecd,edf->ecf", x, plain["up"]).astype(np.float64)
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    assert_near(expert_ffn(plain, jnp.asarray(x)), np.einsum("ecf,efd->ecd", gelu, plain["down"]), "gelu")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sorted(0.0), r"experts\.capacity=0\.0"),
        (lambda: Dense(1.0, group="rows"), r"experts\.group='rows'.*'shard', 'global'"),
        (lambda: Sorted(1.0, group=0), r"experts\.group=0"),
        (lambda: Sorted(0.0004), r"experts\.capacity=0\.0004.*at least 0\.001"),
        (lambda: Sorted(1.0, group=3)(params(), draw(B, T, D), token_route(), context(mask())), r"groups=3.*8 rows"),
        (lambda: ExpertParallel(1.0, group="global"), r"group='global'.*Sorted"),
        (lambda: ExpertParallel()(params(), draw(B, T, D), token_route(), context(mask())), r"Parallel.*'expert'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- the contract notices


@dataclasses.dataclass(frozen=True)
class Broken(Sorted):
    """Experts with one fault."""


class CountsPadding(Broken):
    def __call__(self, params, x, route, context):
        return super().__call__(params, x, route, RouteContext(jnp.ones_like(context.valid), context.layer))


class WeighsByOne(Broken):
    def __call__(self, params, x, route, context):
        return super().__call__(params, x, TokenRoute(route.ids, jnp.ones_like(route.weights)), context)


class StopsTheRouter(Broken):
    def __call__(self, params, x, route, context):
        return super().__call__(params, x, TokenRoute(route.ids, jax.lax.stop_gradient(route.weights)), context)


class SwapsExperts(Broken):
    def __call__(self, params, x, route, context):
        return super().__call__(params, x, TokenRoute(route.ids[..., ::-1], route.weights), context)


class KeepsTheLast(Broken):
    """Drops the first comers instead of the last."""

    def __call__(self, params, x, route, context):
        turned = TokenRoute(route.ids[::-1], route.weights[::-1])
        y, stats = super().__call__(params, x[::-1], turned, RouteContext(context.valid[::-1], context.layer))
        return y[::-1], stats


class DropsTokenByToken(Broken):
    """Turns go by token, both choices at once, instead of by choice."""

    def __call__(self, params, x, route, context):
        y, stats = super().__call__(params, x, TokenRoute(route.ids[..., ::-1], route.weights[..., ::-1]), context)
        return y, stats


class ForgetsTheDropped(Broken):
    def __call__(self, params, x, route, context):
        y, stats = super().__call__(params, x, route, context)
        return y, dataclasses.replace(stats, dropped=jnp.zeros_like(stats.dropped))


class DropsInSilence(Broken):
    def __call__(self, params, x, route, context):
        return Sorted(0.5)(params, x, route, context)


class AnswersInFloat32(Broken):
    def __call__(self, params, x, route, context):
        y, stats = super().__call__(params, x, route, context)
        return y.astype(jnp.float32), stats


class HasNoEqual(Broken):
    __hash__ = Broken.__hash__

    def __eq__(self, other):
        return self is other


OUTPUTS = "outputs_and_all_gradients_equal_the_reference"
NOTICED_BY = {
    CountsPadding(0.7): OUTPUTS,
    WeighsByOne(2.0): OUTPUTS,
    StopsTheRouter(2.0): OUTPUTS,
    SwapsExperts(0.7): OUTPUTS,
    KeepsTheLast(0.7): OUTPUTS,
    DropsTokenByToken(0.7): OUTPUTS,
    ForgetsTheDropped(0.7): "statistics_count_valid_assignments",
    DropsInSilence(): "all_tokens_to_one_expert",
    CountsPadding(1.0): "padding_changes_nothing",
    AnswersInFloat32(2.0): "the_answer_has_the_dtype_of_x",
    HasNoEqual(): "experts_are_a_static_value",
}


@pytest.mark.parametrize("broken", NOTICED_BY, ids=repr)
def test_the_contract_notices(broken):
    contract = ExpertsContract()
    contract.experts, contract.kinds = broken, ("token",)
    with pytest.raises(AssertionError):
        getattr(contract, f"test_{NOTICED_BY[broken]}")()


# --- the page


@pytest.fixture(scope="module")
def page():
    """What the code of docs/add_experts.md defines, run in its order."""
    text = (Path(__file__).parents[1] / "docs" / "add_experts.md").read_text(encoding="utf-8")
    names: dict = {"__name__": "add_experts"}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        assert len(block.splitlines()) <= 35, "an example is read at one glance"
        exec(compile(block, "docs/add_experts.md", "exec"), names)
    return names


def inherited(contract):
    return [name for name in dir(contract) if name.startswith("test_")]


@pytest.mark.parametrize("name", inherited(ExpertsContract))
def test_the_pages_experts_hold_to_the_contract(page, name):
    getattr(page["TestOneByOne"](), name)()


@pytest.mark.parametrize("name", inherited(RouterContract))
def test_the_pages_router_holds_to_the_contract(page, name):
    getattr(page["TestHashChoice"](), name)()


def test_the_pages_model_runs_and_learns(page):
    out, config = page["out"], page["config"]
    assert out.logits.shape == (2, 12, config.vocab) and bool(jnp.all(jnp.isfinite(out.logits)))
    assert out.metrics["load"].shape == (1, 4) and np.all(out.metrics["load"].sum(axis=1) == 2 * 24)
    assert not np.any(out.metrics["dropped"])
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(page["slopes"]["layers_0"]["moe"]))
