"""Which body of a kernel runs: by the platform lowered for, never silently, and not on a guess."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import IMPLS, _dispatch
from pallas_kernels._dispatch import choose, dispatch_plan, divisors, on_each_device, run_chosen


def supports(**reasons):
    return reasons.get


BODIES = {"xla": lambda x: x + 1, "triton": lambda x: x + 2, "mosaic": lambda x: x + 3, "interpret": lambda x: x + 4}


def test_the_first_kernel_that_can_run_is_planned():
    assert dispatch_plan("op", supports()) == {"cuda": "triton", "default": "xla"}
    assert dispatch_plan("op", supports(triton="too wide")) == {"cuda": "mosaic", "default": "xla"}


def test_where_none_can_run_the_plan_says_why():
    plan = dispatch_plan("op", supports(triton="too wide", mosaic="not written"))
    assert plan == {"cuda": "triton: too wide; mosaic: not written", "default": "xla"}


@pytest.mark.parametrize(("impl", "platform"), [("xla", "default"), ("triton", "cuda"), ("interpret", "default")])
def test_an_explicit_impl_is_the_whole_plan(impl, platform):
    assert dispatch_plan("op", supports(), impl) == {platform: impl}


def test_an_explicit_impl_that_cannot_run_raises_its_reason():
    with pytest.raises(ValueError, match="op impl='triton' cannot run: too wide"):
        choose("op", supports(triton="too wide"), "triton")


def test_without_an_impl_what_xla_cannot_do_raises_too():
    with pytest.raises(ValueError, match="op impl=None cannot run: not built"):
        choose("op", supports(xla="not built", triton="not built", mosaic="not built"), None)


@pytest.mark.parametrize("impl", ["Triton", "cuda", ""])
def test_an_unknown_impl_names_the_known(impl):
    with pytest.raises(ValueError, match=f"op impl='{impl}' is unknown. Known: {', '.join(IMPLS)}; None chooses"):
        choose("op", supports(), impl)


def test_a_fallback_is_said_once_for_each_reason(caplog):
    _dispatch._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        for _ in range(3):
            assert choose("op", supports(triton="too wide", mosaic="not written"), None) == (("default", "xla"),)
        choose("op", supports(triton="too long", mosaic="not written"), None)
        choose("other", supports(), None)
    assert [record.message for record in caplog.records] == [
        "op runs on cuda without a kernel (triton: too wide; mosaic: not written).",
        "op runs on cuda without a kernel (triton: too long; mosaic: not written).",
    ]


def test_an_explicit_impl_falls_back_to_nothing_and_says_nothing(caplog):
    _dispatch._say_fallback.cache_clear()
    choose("op", supports(triton="too wide", mosaic="not written"), "xla")
    assert not caplog.records


@pytest.mark.parametrize(("platform", "added"), [("cpu", 1), ("cuda", 2), ("rocm", 1), ("tpu", 1)])
def test_the_body_is_that_of_the_platform_lowered_for(platform, added):
    choice = choose("op", supports(), None)
    traced = jax.jit(lambda x: run_chosen(choice, BODIES, x)).trace(jnp.float32(0))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    constants = [n for n in (1, 2, 3, 4) if f"dense<{n}.0" in text]
    assert constants == [added]


def test_a_body_that_cannot_run_is_not_even_traced():
    traced = []
    bodies = {name: lambda x, name=name: (traced.append(name), x)[1] for name in IMPLS}
    choice = choose("op", supports(triton="too wide", mosaic="not written"), None)
    jax.jit(lambda x: run_chosen(choice, bodies, x)).trace(jnp.float32(0))
    assert traced == ["xla"]


def mesh(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
    )


def test_axes_that_divide_are_taken_in_order():
    with mesh(data=4, fsdp=2, expert=3, tensor=8):
        assert divisors(8, ("data", "fsdp", "expert")) == ("data", "fsdp")
        assert divisors(6, ("data", "fsdp", "expert")) == ("fsdp", "expert")
        assert divisors(4, ("tensor",)) == ()
        assert divisors(8, ("pipe", "tensor")) == ("tensor",)


def test_without_a_mesh_nothing_is_cut():
    assert divisors(8, ("data", "tensor")) == ()
    body = BODIES["xla"]
    assert on_each_device(body, {}, ("B",), "B") is body


def test_on_a_mesh_each_device_sees_its_shards():
    seen = {}

    def body(x, y):
        seen.update(x=x.shape, y=y.shape, free=dict(_dispatch._free_axes()))
        return x

    with mesh(data=4, tensor=2):
        shards = {"B": divisors(8, ("data",)), "K": divisors(6, ("tensor",))}
        fn = on_each_device(body, shards, ("B K d", "K"), "B K d")
        out = jax.eval_shape(fn, jax.ShapeDtypeStruct((8, 6, 5), "float32"), jax.ShapeDtypeStruct((6,), "float32"))
    assert seen == {"x": (2, 3, 5), "y": (3,), "free": {}}
    assert out.shape == (8, 6, 5)


def test_importing_the_package_warns_of_nothing_and_touches_no_device():
    import subprocess
    import sys

    code = "import pallas_kernels; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
