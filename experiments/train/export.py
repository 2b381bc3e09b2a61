"""What a run leaves for others: a Hugging Face directory, or the adapters that PEFT loads."""

import dataclasses
import shutil
from pathlib import Path

from experiments.train.first_state import Start, trained
from experiments.train.settings import TrainingConfig
from jaxfw.core.distributed import barrier, current
from jaxfw.data import Tokenizer
from jaxfw.generate import LM
from jaxfw.train import TrainState
from jaxfw.weights import save_adapters


def save_trained(c: TrainingConfig, begun: Start, state: TrainState, tokenizer: Tokenizer, workdir: Path) -> Path:
    """`workdir/model`, or `workdir/adapter` where adapters were trained; written anew, by all processes together."""
    target = workdir / ("adapter" if c.lora else "model")
    if current().is_main:
        shutil.rmtree(target, ignore_errors=True)
    barrier("before the model is saved")
    params = trained(c, state)
    if c.lora is not None:
        return save_adapters(target, begun.loss.config, params, c.lora, base=c.init)
    if begun.lm is not None:
        lm = dataclasses.replace(begun.lm, params=params)
    else:
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        lm = LM(begun.loss.config, params, tokenizer, stop_ids=stop)
    return lm.save(target)
