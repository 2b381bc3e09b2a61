"""Meshes by name, what of a layout fits, and what `constrain` constrains."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxfw.core.errors import InputError
from jaxfw.core.mesh import AXES, BATCH_AXES, abstract_mesh, constrain, fit, make_mesh, parse_mesh


def test_a_mesh_has_all_axes_and_they_are_auto():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert set(mesh.axis_names) == set(AXES) and mesh.size == 1
    assert set(mesh.axis_types) == {AxisType.Auto}
    wide = abstract_mesh(tensor=4, data=2)
    assert dict(wide.shape) == {"data": 2, "fsdp": 1, "expert": 1, "pipe": 1, "tensor": 4}
    assert wide.axis_names[-1] == "tensor", "tensor shards are nearest neighbours"


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"mesh data=2, tensor=4 needs 8 devices, there are 1: .* product is 1"):
        make_mesh(data=2, tensor=4, devices=jax.devices()[:1])
    with pytest.raises(InputError, match=r"tensor=0: every size must be at least 1"):
        make_mesh(tensor=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensr=2", r"mesh axis='tensr' is unknown\. .* Did you mean 'tensor'\?"),
        ("data=2,data=4", r"'data' is given twice in 'data=2,data=4'"),
        ("data=two", r"data='two' must be a whole number of at least 1"),
        ("data", r"data='' must be a whole number"),
        ("data=0", r"data='0' must be a whole number"),
    ],
)
def test_mesh_flags_that_are_wrong_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_mesh(text)


def test_mesh_flags():
    assert parse_mesh("") == {}
    assert parse_mesh(" tensor=4, data=2") == {"tensor": 4, "data": 2}


@given(
    st.dictionaries(st.sampled_from(AXES), st.integers(1, 6)),
    st.lists(st.tuples(st.integers(1, 60), st.permutations(AXES), st.integers(0, 3)), max_size=3),
)
def test_what_fits_divides_and_nothing_else_is_left_out(sizes, axes):
    shape = [size for size, _, _ in axes]
    wanted = [tuple(names[:count]) for _, names, count in axes]
    for size, names, entry in zip(shape, wanted, fit(sizes, shape, wanted), strict=True):
        kept = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        parts = math.prod(sizes[name] for name in kept)
        assert size % parts == 0
        assert [name for name in names if name in kept] == list(kept)
        for name in set(names) - set(kept):
            assert name not in sizes or size % (parts * sizes[name]) != 0


def test_constrain_is_nothing_without_a_mesh_and_on_one_device():
    x = jnp.ones((4, 6))
    assert constrain(x, BATCH_AXES, None) is x
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert constrain(x, BATCH_AXES, None) is x


def test_constrain_lays_out_what_divides_and_leaves_manual_axes_alone():
    def specs(f, *shape):
        found = []

        def walk(jaxpr):
            for equation in jaxpr.eqns:
                if equation.primitive.name == "sharding_constraint":
                    found.append(equation.params["sharding"].spec)
                for value in equation.params.values():
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        walk(inner)

        walk(jax.make_jaxpr(f)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr)
        return found

    def f(x):
        return constrain(x, BATCH_AXES, "tensor", None)

    with jax.sharding.use_abstract_mesh(abstract_mesh(data=2, tensor=4)):
        assert specs(f, 4, 8, 3) == [PartitionSpec(BATCH_AXES, "tensor", None)]
        assert specs(f, 3, 2, 3) == [PartitionSpec(("fsdp", "expert"), None, None)], "axes of size 1 always fit"
        spec = PartitionSpec(None, "tensor")
        some = jax.shard_map(f, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)
        assert specs(some, 4, 8, 3) == [PartitionSpec(BATCH_AXES, None, None)]
        everything = jax.shard_map(f, in_specs=spec, out_specs=spec, check_vma=False)
        assert specs(everything, 4, 8, 3) == []
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        assert specs(f, 4, 8, 3) == [PartitionSpec("data", None, None)], "a mesh of the user's own lacks axes"


def test_explicit_axes_are_refused_with_the_remedy():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(InputError, match=r"mesh axes data are Explicit.*make_mesh"):
        constrain(jnp.ones((4, 6)), BATCH_AXES, None)
