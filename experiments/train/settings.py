"""The settings of a training run, checked before anything is read."""

import dataclasses
from typing import Any

from jaxfw.core.config import to_dataclass
from jaxfw.core.errors import InputError, unknown
from jaxfw.core.mesh import parse_mesh
from jaxfw.models import DecoderConfig
from jaxfw.train import OptimizerConfig
from jaxfw.train.lora import LoRAConfig

PACKINGS = ("documents", "stream")
QUANTISED = ("", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How files become examples.

    `packing` "documents" packs whole ones into rows and masks them from each other, "stream" cuts windows from one
    stream of all. Every `held_out`-th document is for validation, where no file is named for it.
    """

    column: str
    chat: bool
    packing: str
    held_out: int

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise unknown("reading.packing", self.packing, PACKINGS)
        if self.held_out < 2:
            raise InputError(f"reading.held_out={self.held_out} must be at least 2: every so many-th is held out.")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """`chunk`: tokens of a row whose logits exist at once (0: all). `remat`: what a layer keeps for its gradient."""

    chunk: int
    remat: str
    router_losses: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Steps or, where they are 0, passes over the data; their batches, and how often to look."""

    steps: int
    epochs: float
    batch: int
    length: int
    log_every: int
    evaluate_every: int
    save_every: int
    keep: int
    validation_batches: int

    def __post_init__(self):
        for name in ("batch", "length", "log_every", "evaluate_every", "save_every", "keep", "validation_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)} must be at least 1.")
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise InputError(
                f"train.steps={self.steps} and train.epochs={self.epochs}: give steps, or 0 and how often to read all."
            )
        if self.batch * self.validation_batches < 2:
            raise InputError("train.batch=1 with train.validation_batches=1 is one window: an interval needs two.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A whole run: what it begins from, what it reads, how it trains.

    `init` is a model directory, or a workdir that holds one; `model` describes a fresh one (None: that of `init`).
    `tokenizer` is a directory, "train" for one made from the data, or empty for that of `init`.
    """

    experiment: str
    seed: int
    init: str
    resume: str
    data: str
    validation: str
    tokenizer: str
    mesh: str
    param_dtype: str
    dtype: str
    quantise: str
    stack_layers: bool
    model: DecoderConfig | None
    reading: ReadingConfig
    lora: LoRAConfig | None
    loss: LossSettings
    optimizer: OptimizerConfig
    train: LoopConfig

    def __post_init__(self):
        if self.seed < 0:
            raise InputError(f"config.seed={self.seed} must be 0 or more.")
        if not self.init and self.model is None:
            raise InputError("config.init='' is empty and there is no config.model: give a model directory.")
        if not self.data:
            raise InputError("config.data='' is empty: give a file of text, JSON or parquet, a folder, or token files.")
        if self.quantise not in QUANTISED:
            raise unknown("config.quantise", self.quantise, QUANTISED)
        if self.quantise and self.lora is None:
            raise InputError(
                f"config.quantise={self.quantise!r} holds weights that cannot be trained: train adapters beside them "
                "(config.lora), or leave it out."
            )
        if not self.init and (self.lora is not None or self.quantise):
            raise InputError("config.lora adapts a model that exists: name it by config.init=DIR.")
        if not self.init and self.tokenizer == "":
            raise InputError(
                "config.tokenizer='' with no config.init: give a directory, or 'train' for one of the data."
            )
        if self.lora is not None and self.stack_layers:
            raise InputError("config.stack_layers=True is not built for adapters: set it to False.")
        parse_mesh(self.mesh)


def settings(config: Any) -> TrainingConfig:
    """From a ConfigDict, or any nest of mappings."""
    return to_dataclass(TrainingConfig, config)
