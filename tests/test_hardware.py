"""Peaks by device kind: dense ones, of known cards only."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxfw.core.errors import InputError
from jaxfw.core.hardware import CARDS, memory_bandwidth, mfu, peak_flops


def cards(*kinds):
    return [SimpleNamespace(device_kind=kind) for kind in kinds]


def test_the_share_of_several_cards():
    h100 = cards("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    assert mfu(989.4e12, h100) == pytest.approx(0.5)
    assert mfu(494.7e12, h100, jnp.float32) == pytest.approx(0.5), "float32 is multiplied in TF32"
    assert peak_flops(cards("NVIDIA H200"), jnp.float8_e4m3fn) == pytest.approx(1978.9e12)
    assert memory_bandwidth(cards("NVIDIA H200")[0]) == 4.8e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 NVL", "NVIDIA H100", "TPU v5p", "NVIDIA GeForce RTX 4090"])
def test_what_is_not_known_has_no_peak(kind):
    """A name that only begins like a known one is another card; one unknown among known ones spoils the sum."""
    assert peak_flops(cards(kind), "bfloat16") is None and memory_bandwidth(cards(kind)[0]) is None
    assert mfu(1e12, cards("NVIDIA H200", kind)) is None
    assert peak_flops(cards("NVIDIA A100-SXM4-80GB"), jnp.float8_e5m2) is None, "it has no such units"


def test_here():
    assert mfu(1e12, jax.devices("cpu")) is None


def test_formats_are_in_the_ratios_of_the_tensor_cores():
    """A sparse figure among dense ones would be twice too large."""
    for kind, card in CARDS.items():
        if card.tf32:
            assert card.bfloat16 / card.tf32 == pytest.approx(2, rel=1e-3), kind
        if card.float8:
            assert card.float8 / card.bfloat16 == pytest.approx(2, rel=2e-3), kind


def test_a_dtype_without_matrix_units_is_named():
    with pytest.raises(InputError, match=r"dtype='int32' is unknown\. Known: bfloat16"):
        peak_flops(cards("NVIDIA H200"), jnp.int32)
