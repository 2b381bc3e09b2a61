"""Fine-tuning follows transformers' loss curves, balance loss of mixtures and padding included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from experiments import finetune_parity as study  # noqa: E402
from jaxfw.ops import routing  # noqa: E402

L, B, T, E = 3, 2, 7, 5


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("is_padded", [False, True])
def test_joint_balance_and_its_gradient_are_transformers(k, is_padded):
    from transformers.models.qwen2_moe import modeling_qwen2_moe as module  # pyright: ignore[reportMissingImports]

    logits = 2 * np.random.default_rng(k).standard_normal((L, B, T, E)).astype(np.float32)
    mask = np.arange(T) < np.array([[T], [3 if is_padded else T]])
    theirs = torch.from_numpy(logits).requires_grad_()
    loss_there = module.load_balancing_loss_func(
        tuple(layer.flatten(0, 1) for layer in theirs), E, k, torch.from_numpy(mask).long() if is_padded else None
    )
    loss_there.backward()

    def loss(logits):
        probs = jax.nn.softmax(logits, axis=-1)
        loads = [routing.load(routing.choose(layer, k), jnp.asarray(mask), E) for layer in probs]
        sums = [routing.importance(layer, jnp.asarray(mask)) for layer in probs]
        return routing.joint_balance_loss(jnp.stack(sums), jnp.stack(loads))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    np.testing.assert_allclose(value, loss_there.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


def test_a_llama_is_fine_tuned_alike():
    start = study.build(study.llama())
    theirs, ours = study.torch_curve(start, "sdpa"), study.our_curve(start, chunk=16)
    assert study.fall(ours) >= study.FALL
    assert study.difference(theirs, ours) <= study.TOLERANCE


def test_a_mixture_is_fine_tuned_alike():
    start = study.build(study.mixture())
    theirs, ours = (side(start) for side in (_there, _here))
    row = study.compare(theirs, ours, start)
    assert study.fall(ours) >= study.FALL
    assert row["choices"] > 30_000 and row["ok"], row


def _there(start):
    return study.torch_curve(start, "eager", coefficient=study.COEFFICIENTS[1])


def _here(start):
    return study.our_curve(start, coefficient=study.COEFFICIENTS[1])


def test_an_outlier_counts_only_behind_a_near_tie():
    """Two steps, one layer, one row of two tokens; the second token's two best experts nearly tie in step 1."""
    start = dataclasses.replace(_NOTHING, segment_ids=np.ones((2, 1, 3), np.int32))
    probs = np.tile(np.array([0.6, 0.3, 0.1]), (2, 1, 1, 2, 1))
    probs[1, 0, 0, 1] = 0.4, 0.4 - 5e-7, 0.2
    reference = study.Curve(np.array([2.0, 1.5]), probs)
    turned = probs.copy()
    turned[1, 0, 0, 1] = 0.4 - 5e-7, 0.4, 0.2
    same = study.Curve(reference.losses + 1e-6, probs)
    assert study.compare(reference, same, start)["ok"]
    assert not study.compare(reference, study.Curve(reference.losses + 1e-3, probs), start)["ok"], "no choice changed"
    late = study.Curve(reference.losses + np.array([0, 1e-6]), turned)
    found = study.compare(reference, late, start)
    assert (found["near_ties"], found["changed"], found["first_change"]["step"]) == (1, 1, 1)
    jumped = dataclasses.replace(late, losses=reference.losses + np.array([0, 1e-3]))
    assert study.compare(reference, jumped, start)["ok"], "the jump is behind a near-tie"
    early = dataclasses.replace(late, losses=reference.losses + 1e-3)
    assert not study.compare(reference, early, start)["ok"], "the curves differed before"
    probs[1, 0, 0, 1] = 0.5, 0.3, 0.2
    assert not study.compare(reference, jumped, start)["ok"], "the gap was wide"
    start.segment_ids[1, 0, 1] = 0
    assert study.compare(reference, late, start)["changed"] == 0, "padding does not choose"


@dataclasses.dataclass(frozen=True)
class _Choices:
    per_token: int = 1


@dataclasses.dataclass(frozen=True)
class _Config:
    moe: _Choices = _Choices()


_NOTHING = study.Start(None, _Config(), None, np.empty(0), np.empty(0))  # pyright: ignore[reportArgumentType]
