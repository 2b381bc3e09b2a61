"""Training adapters beside a model that does not change; quantised, that is QLoRA (arXiv:2305.14314).

    lora = LoRAConfig(rank=8, alpha=16.0, dropout=0.05, targets="attention")
    loss = LoRALoss(NextTokenLoss(config), lora)
    adapters = init_adapters(lora, params, jax.random.key(0))
    train_state = init_state(adapters, optimizer, state=loss.init_state(params))

What is trained, has an optimiser's state and is saved are the adapters. The model lies in `state["frozen"]`.
"""

import dataclasses

import jax

from jaxfw.core.shapes import Array, Float, PRNGKeyArray, PyTree
from jaxfw.models.lora import TARGETS, LoRAConfig, adapt, init_adapters, merge
from jaxfw.train.step import FROZEN, Aux, LossFn

__all__ = ["TARGETS", "LoRAConfig", "LoRALoss", "adapt", "init_adapters", "merge"]


@dataclasses.dataclass(frozen=True)
class LoRALoss:
    """A loss of adapters: that of the model in `state["frozen"]` with them beside its kernels; a `LossFn`.

    What the adapters drop is drawn from the key, apart from what the loss itself draws. In evaluation nothing is to
    be dropped: give `adapt(frozen, adapters, lora)` to what evaluates the model.
    """

    loss: LossFn
    lora: LoRAConfig

    def init_state(self, frozen: PyTree) -> PyTree:
        """The training state's `state` before the first batch: that of the loss, and the model.

        A step takes over the state that it is given: the model's arrays are then those in the state it returns.
        """
        make = getattr(self.loss, "init_state", dict)
        return make() | {FROZEN: frozen}

    def __call__(
        self, params: PyTree, batch: PyTree, key: PRNGKeyArray, *, state: PyTree
    ) -> tuple[Float[Array, ""], Aux]:
        own, dropped = jax.random.split(key)
        frozen = {FROZEN: state[FROZEN]}
        model = adapt(frozen[FROZEN], params, self.lora, dropped)
        loss, aux = self.loss(model, batch, own, state={k: v for k, v in state.items() if k != FROZEN})
        return loss, Aux(aux.metrics, aux.state | frozen)
