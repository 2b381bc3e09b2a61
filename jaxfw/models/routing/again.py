"""A choice between two computations at run time whose gradient holds what went in and no more."""

import functools
from collections.abc import Callable

import jax

from jaxfw.core.shapes import Array, Bool, PyTree

Form = Callable[[PyTree, PyTree], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cond_again(forms: tuple[Form, Form], chosen: Bool[Array, ""], floats: PyTree, fixed: PyTree) -> Array:
    """`lax.cond` between two forms of (floats, fixed) whose gradient by `floats` runs the form again.

    It holds the operands alone. That of `lax.cond` holds what both forms would, zeros for the one that did not run.
    """
    return jax.lax.cond(chosen, *forms, floats, fixed)


def _forward(forms, *operands):
    return cond_again(forms, *operands), operands


def _backward(forms, operands, cotangent):
    def back(form, floats, fixed, cotangent):
        return jax.vjp(lambda floats: form(floats, fixed), floats)[1](cotangent)[0]

    chosen, *rest = operands
    return None, jax.lax.cond(chosen, *(functools.partial(back, form) for form in forms), *rest, cotangent), None


cond_again.defvjp(_forward, _backward)
