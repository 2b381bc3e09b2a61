"""One program of one model on one cluster: compiled, accounted for, and played through a model of the machine."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from jaxfw.audit import programs
from jaxfw.audit.account import Account, account
from jaxfw.audit.options import parse_options
from jaxfw.audit.traffic import Flow, Overlap, flows, kernels, overlaps, sources
from jaxfw.audit.warnings import compiler_log, replicated
from jaxfw.core import aot
from jaxfw.core.errors import InputError, unknown
from jaxfw.core.mesh import parse_mesh
from jaxfw.core.replay import PROFILES, Timeline, replay
from jaxfw.core.targets import CHIPS
from jaxfw.models import DecoderConfig
from jaxfw.models.presets import PRESETS, preset
from jaxfw.models.routing import Sorted
from jaxfw.ops.routing import LEAST_FACTOR
from jaxfw.train import OptimizerConfig
from jaxfw.train.language import REMAT
from jaxfw.weights import load_config

PROGRAMS = ("train", "decode", "prefill")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be compiled, for what; every field can be varied by its name.

    `model` is a preset or a directory of the Hub's form, unless `config` says what it is. `dtypes` are those of
    parameters and of arithmetic, as in "float32/bfloat16". Of a training step, `batch` rows are of all devices, and
    `capacity` is that of experts; 0 drops nothing.
    """

    model: str = ""
    program: str = "train"
    target: str = "h200:1x8"
    mesh: str = ""
    batch: int = 8
    length: int = 4096
    dtypes: str = ""
    remat: str = "none"
    chunk: int = 0
    capacity: float = 0.0
    stacked: bool = True
    quantise: str = ""
    kv: str = ""
    options: str = "none"
    config: DecoderConfig | None = None
    optimizer: OptimizerConfig | None = None

    def __post_init__(self):
        if self.program not in PROGRAMS:
            raise unknown("--program", self.program, PROGRAMS)
        if self.remat != "none" and self.remat not in REMAT:
            raise unknown("--remat", self.remat, ("none", *REMAT))
        if self.capacity:
            self._check_capacity()
        if self.kv and self.program != "decode":
            raise InputError(f"--kv={self.kv} is of a cache, which --program={self.program} has none of: take decode.")
        parse_options(self.options)

    def _check_capacity(self) -> None:
        said = f"--capacity={self.capacity:g}"
        if self.capacity < LEAST_FACTOR:
            raise InputError(f"{said} must be at least {LEAST_FACTOR}, or 0 to drop nothing.")
        if self.program != "train":
            raise InputError(f"{said} is for training: {self.program} drops nothing. Leave it out.")
        if self.decoder.moe is None:
            raise InputError(f"{said} is of experts, and this model has none: leave it out.")

    @property
    def decoder(self) -> DecoderConfig:
        """The model, in the dtypes that are asked for.

        Raises:
            InputError: no such preset or directory, or dtypes that cannot be read.
        """
        found = self.config
        if found is None:
            if not self.model:
                raise InputError("--model is missing: name a preset, a model directory, or a --config with a model.")
            found = preset(self.model) if self.model in PRESETS else load_config(self._directory())
        if not self.dtypes:
            return found
        params, _, arithmetic = self.dtypes.partition("/")
        return dataclasses.replace(found, param_dtype=params, dtype=arithmetic or params)

    def _directory(self) -> str:
        if "/" not in self.model and not Path(self.model).is_dir() and not self.model.startswith("embedded"):
            raise unknown("--model", self.model, PRESETS)
        return self.model

    def build(self) -> programs.Program:
        """The program on its mesh."""
        config, axes = self.decoder, parse_mesh(self.mesh) or {}
        mesh = aot.cluster(self.target, **(axes or self._default_axes()))
        if self.program == "decode":
            return programs.decode_step(
                config, mesh, batch=self.batch, length=self.length, quantise=self.quantise or None, kv=self.kv or None
            )
        if self.program == "prefill":
            return programs.prefill_layer(config, mesh, batch=self.batch, length=self.length)
        return programs.train_step(
            config, mesh, batch=self.batch, length=self.length, optimizer=self.optimizer,
            remat=None if self.remat == "none" else self.remat, chunk=self.chunk or None,
            experts=Sorted(capacity=self.capacity) if self.capacity else None, stacked=self.stacked,
        )  # fmt: skip

    def _default_axes(self) -> dict[str, int]:
        """Training cuts everything over all devices, the rest cuts heads."""
        _, (slices, hosts, gpus) = aot.parse_target(self.target)
        return {"fsdp" if self.program == "train" else "tensor": slices * hosts * gpus}

    @property
    def gpus_per_host(self) -> int:
        """Of its target."""
        return aot.parse_target(self.target)[1][2]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What came of it. `timeline` is predicted; None where the chip's rates are not known.

    `replicated` are arrays that the compiler gathers whole, for want of a better way from one layout to the next.
    """

    request: Request
    what: str
    account: Account
    flows: list[Flow]
    kernels: dict[str, int]
    sources: dict[tuple[str, str], int]
    timeline: Timeline | None
    overlaps: list[Overlap]
    replicated: list[str]
    compile_seconds: float

    def figures(self) -> dict[str, Any]:
        """The few numbers that two audits are compared by."""
        found: dict[str, Any] = {
            "GB a device": self.account.total / 1e9, "fits": self.account.fits,
            "temporaries (GB)": self.account.temporaries / 1e9,
            "collectives": sum(flow.times for flow in self.flows),
            "sent (GB)": sum(flow.bytes for flow in self.flows) / 1e9,
        }  # fmt: skip
        if self.timeline is not None:
            found |= {"predicted (ms)": 1e3 * self.timeline.seconds, "hidden": self.timeline.hidden()}
        return found


def audit(request: Request) -> Audit:
    """Compile a request and read what came of it.

    Raises:
        InputError: what cannot be built, or an option that this version of XLA does not have.
    """
    chip, _ = aot.parse_target(request.target)
    program = request.build()
    begun = time.perf_counter()
    try:
        with compiler_log() as said:
            compiled = program.compile(parse_options(request.options))
    except Exception as error:
        if "No such compile option" not in str(error):
            raise
        raise InputError(f"--options: {error} in jax {jax.__version__}, whose XLA is newer or older.") from None
    seconds = time.perf_counter() - begun
    profile = PROFILES.get(chip)
    timeline = None
    if profile is not None:
        timeline = replay(compiled.text, profile, gpus_per_host=request.gpus_per_host, streams=compiled.streams)
    return Audit(
        request, program.what, account(program, compiled, CHIPS[chip]), flows(compiled.text, program.mesh),
        kernels(compiled.text), sources(compiled.text), timeline,
        overlaps(compiled.text, timeline) if timeline else [], replicated(said), seconds,
    )  # fmt: skip
