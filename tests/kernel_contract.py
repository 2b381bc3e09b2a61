"""What every kernel must hold to, as tests that a kernel's test inherits.

    class TestScale(KernelContract):
        op = staticmethod(scale)
        supports = staticmethod(supports_scale)
        cases = (Case("odd", {"N": 3, "d": 80}),)
        named = {"8b": ...}                     # shapes of real models: compiled for an H200
        def arguments(self, case, rng): ...     # arrays (float32) by name, then options
        def reference(self, arrays, options): ...

`impl="interpret"` shows that a kernel's arithmetic is right and that it stays within its arrays, compiling that it
lowers and fits. Speed and races show on a GPU only.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plt

from pallas_kernels._dispatch import IMPLS

# Compiling is most of what these tests take. The second option, which later versions lack, makes it 3 times as fast.
FAST_TO_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    FAST_TO_COMPILE["xla_cpu_use_fusion_emitters"] = False
TRITON = "__gpu$xla.gpu.triton"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A small problem: sizes by axis letter, and what else the kernel's `arguments` reads."""

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"


def assert_close(got: Any, wanted: Any, dtype: str, *, what: str) -> None:
    """float32: 1e-5 of the largest value, at least 1. bfloat16: one unit in the last place, and 1e-3 of the largest.

    Infinities must stand at the same places. `dtype` is that of the result: sums that stay in float32 are held to it.
    """
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, f"{what}: {got.shape} for {wanted.shape}"
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(got[~finite], wanted[~finite], err_msg=what)
    got, wanted = got[finite], wanted[finite]
    largest = np.abs(wanted).max(initial=0.0)
    bound = 1e-5 * max(1.0, largest)
    if dtype == "bfloat16":
        magnitude = np.maximum(np.abs(wanted), np.finfo(np.float32).tiny)
        bound = 2.0 ** (np.floor(np.log2(magnitude)) - 7) + 1e-3 * largest
    worst = np.max(np.abs(got - wanted) - bound, initial=-1.0)
    assert worst <= 0, f"{what}: beyond its bound by {worst:.2e}, the largest value is {largest:.2e}"


def fast_jit(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fn, compiler_options=FAST_TO_COMPILE)


@contextlib.contextmanager
def poisoned_bounds() -> Iterator[None]:
    """While a Triton body is traced: what it loads beyond an array is NaN (of whole numbers the largest), and storing
    there leaves NaN in the array.

    Interpreted, such accesses are moved inside or dropped; on a GPU they read and overwrite other arrays.
    """
    load, store = plt.load, plt.store

    def outside(ref, mask):
        *_, indexer = ref.transforms
        pairs = [(i, size) for i, size in zip(indexer.indices, indexer.shape, strict=True) if isinstance(i, jax.Array)]
        beyond = functools.reduce(jnp.logical_or, [(i < 0) | (i >= size) for i, size in pairs], jnp.bool_(False))
        return beyond if mask is None else beyond & mask

    def checked_load(ref, *, mask=None, **options):
        loaded = load(ref, mask=mask, **options)
        wrong = jnp.nan if jnp.issubdtype(loaded.dtype, jnp.floating) else jnp.iinfo(loaded.dtype).max
        return jnp.where(outside(ref, mask), jnp.array(wrong, loaded.dtype), loaded)

    def checked_store(ref, value, *, mask=None, **options):
        # Writes go in order, so that NaN stays in the first element, whose own value comes before.
        beyond = outside(ref, mask)
        inside = ref.ref.at[tuple(jnp.where(beyond, 0, i) for i in ref.transforms[-1].indices)]
        wrong = jnp.nan if jnp.issubdtype(value.dtype, jnp.floating) else jnp.iinfo(value.dtype).max
        store(inside, jnp.where(beyond, jnp.array(wrong, value.dtype), value), mask=mask, **options)

    with mock.patch.multiple(plt, load=checked_load, store=checked_store):
        yield


def _weighted(outputs: Any) -> Any:
    """A sum of all finite values, each with another weight."""
    finite = [jnp.where(jnp.isfinite(x), x, 0.0).ravel() for x in jax.tree.leaves(outputs)]
    return sum(jnp.vdot(x, jnp.cos(jnp.arange(x.size) + i)) for i, x in enumerate(finite))


class KernelContract:
    """Inherit, name the kernel, give cases."""

    op: ClassVar[Callable[..., Any]]
    supports: ClassVar[Callable[..., str | None]]  # supports(impl, **arrays) -> reason or None
    config: ClassVar[Callable[[], Any]]  # makes a new, equal Config at every call
    cases: ClassVar[Sequence[Case]]
    named: ClassVar[Mapping[str, Callable[[], Any]]]  # name -> (arrays, options) of a real model, abstract
    differentiable: ClassVar[tuple[str, ...]] = ()

    def arguments(self, case: Case, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays by name, keyword options) of a case."""
        raise NotImplementedError

    def reference(self, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        """What the kernel must give, from the kernel's own reference."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, values in (("case", self.cases), ("name", tuple(getattr(self, "named", ())))):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, values, ids=lambda value: getattr(value, "name", value))

    @classmethod
    @functools.cache
    def problem(cls, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
        rng = np.random.default_rng([len(case.name), *case.name.encode()])
        arrays, options = cls().arguments(case, rng)
        cast = {n: jnp.asarray(x, case.dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)
                for n, x in arrays.items()}  # fmt: skip
        return cast, options

    @classmethod
    @functools.cache
    def wanted(cls, case: Case) -> Any:
        arrays, options = cls.problem(case)
        return fast_jit(lambda arrays: cls().reference(arrays, options))(arrays)

    def call(self, arrays: dict[str, Any], options: dict[str, Any], impl: str | None) -> Any:
        return type(self).op(**arrays, **options, impl=impl)

    def check(self, case: Case, impl: str | None) -> None:
        arrays, options = self.problem(case)
        with poisoned_bounds():
            got = fast_jit(lambda arrays: self.call(arrays, options, impl))(arrays)
        wanted = self.wanted(case)
        paths = jax.tree_util.tree_leaves_with_path(got)
        for (path, mine), right in zip(paths, jax.tree.leaves(wanted), strict=True):
            assert_close(mine, right, str(mine.dtype), what=f"{impl}{jax.tree_util.keystr(path)}")

    def test_interpreted_it_is_the_reference(self, case):
        self.check(case, "interpret")

    def test_xla_is_the_reference(self, case):
        self.check(case, "xla")

    def test_unknown_impl_names_the_known(self):
        arrays, options = self.problem(self.cases[0])
        with pytest.raises(ValueError, match=r"impl='trition' is unknown\. Known: xla, triton, mosaic, interpret"):
            type(self).op(**arrays, **options, impl="trition")

    def test_an_impl_that_cannot_run_says_why(self):
        arrays, options = self.problem(self.cases[0])
        reasons = {impl: type(self).supports(impl, **arrays) for impl in IMPLS}
        unable = {impl: reason for impl, reason in reasons.items() if reason}
        assert "mosaic" in unable, "written? Then compile it here, as `test_compiles_for_an_h200` does for Triton"
        for impl, reason in unable.items():
            with pytest.raises(ValueError) as raised:
                type(self).op(**arrays, **options, impl=impl)
            assert reason in str(raised.value)

    def test_gradients_are_those_of_the_reference(self):
        if not self.differentiable:
            pytest.skip("the kernel has no gradient")
        case = next(case for case in self.cases if case.dtype == "float32")
        arrays, options = self.problem(case)
        inputs = {name: arrays[name] for name in self.differentiable}
        wanted = fast_jit(jax.grad(lambda x: _weighted(self.reference({**arrays, **x}, options))))(inputs)
        for impl in (None, "interpret"):
            loss = functools.partial(lambda x, impl: _weighted(self.call({**arrays, **x}, options, impl)), impl=impl)
            got = fast_jit(jax.grad(loss))(inputs)
            for name in self.differentiable:
                assert_close(got[name], wanted[name], "float32", what=f"{impl}, gradient of {name}")

    def test_mapped_it_is_a_loop(self):
        arrays, options = self.problem(self.cases[0])
        twice = {name: jnp.stack([x, x[::-1]]) for name, x in arrays.items()}
        op = functools.partial(self.call, options=options, impl="interpret")
        got, loop = fast_jit(jax.vmap(op))(twice), fast_jit(op)
        for i in range(2):
            wanted = loop({name: x[i] for name, x in twice.items()})
            jax.tree.map(lambda a, b, i=i: assert_close(a[i], b, "float32", what=f"row {i}"), got, wanted)

    def test_an_equal_but_new_config_does_not_retrace(self):
        arrays, options = self.problem(self.cases[0])
        options = {name: value for name, value in options.items() if name != "config"}
        traces = []

        @functools.partial(jax.jit, static_argnames="config")
        def jitted(arrays, config):
            traces.append(config)
            return type(self).op(**arrays, **options, impl="xla", config=config)

        first, second = type(self).config(), type(self).config()
        assert first is not second
        jitted(arrays, first), jitted(arrays, second)
        assert len(traces) == 1

    def test_compiles_for_an_h200(self, name):
        """Chosen by platform, on a machine without a GPU: the compiled program holds the kernel, and it fits."""
        from jaxfw.core import aot, hlo

        reason = aot.missing()
        if reason:
            pytest.skip(reason)
        arrays, options = type(self).named[name]()
        mesh = aot.cluster("h200:1x1x1")
        compiled = aot.compile(lambda arrays: type(self).op(**arrays, **options), arrays, mesh=mesh)
        assert hlo.custom_calls(compiled.text) == {TRITON: 1}
