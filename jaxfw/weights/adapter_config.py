"""PEFT's adapter_config.json, read strictly: every field is used, known to be irrelevant, or refused by its name."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxfw.core.errors import InputError
from jaxfw.models.lora import LoRAConfig
from jaxfw.weights import tensors

FILE = "adapter_config.json"
USED = frozenset("peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules".split())
# What says nothing about the result: provenance, how training began, which modules of those that the tensors name.
IRRELEVANT = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode task_type peft_version fan_in_fan_out "
    "init_lora_weights layers_to_transform layers_pattern exclude_modules megatron_config megatron_core loftq_config "
    "eva_config corda_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying".split()
)
# Ways to begin that leave the base model as it is. Others (pissa, olora, loftq, ...) train beside a changed one.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def write(
    lora: LoRAConfig, ranks: Mapping[str, int], *, targets: list[str], base: str | Path | None, fan_in_fan_out: bool
) -> dict[str, Any]:
    """The fields for adapters of these modules, each with its rank; all have the scale of `lora`."""
    others = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "target_modules": targets,
        "rank_pattern": others,
        "alpha_pattern": {
            module: _plain(lora.scale * _divisor(rank, lora.rank_stabilised)) for module, rank in others.items()
        },
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_dora": False,
    }


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else float(number)


def _divisor(rank: int, rank_stabilised: bool) -> float:
    return math.sqrt(rank) if rank_stabilised else rank


@dataclasses.dataclass(frozen=True)
class Described:
    """What a directory's adapter_config.json says; `given` is all of it."""

    path: Path
    rank: int
    alpha: float
    dropout: float
    rank_stabilised: bool
    given: Mapping[str, Any]

    def lora(self, targets: str) -> LoRAConfig:
        """The same as a `LoRAConfig`."""
        return LoRAConfig(self.rank, self.alpha, self.dropout, targets, self.rank_stabilised)

    def rank_of(self, module: str) -> int:
        """The rank of one module's adapter.

        Raises:
            InputError: it is scaled by another factor than the others.
        """
        rank = _matched(self.given.get("rank_pattern"), module, self.rank)
        alpha = _matched(self.given.get("alpha_pattern"), module, self.alpha)
        scale, usual = (a / _divisor(r, self.rank_stabilised) for a, r in ((alpha, rank), (self.alpha, self.rank)))
        if not math.isclose(scale, usual, rel_tol=1e-6):
            raise InputError(
                f"{self.path}: rank_pattern and alpha_pattern scale {module} by {scale:g} and others by {usual:g}, "
                "which are not read: merge the adapter by PEFT's merge_and_unload() and load that model."
            )
        return rank

    def asked_for(self, module: str) -> bool:
        """Whether target_modules names it; False where other fields choose among those that it names."""
        targets = self.given.get("target_modules")
        if any(self.given.get(field) for field in ("layers_to_transform", "layers_pattern", "exclude_modules")):
            return False
        if isinstance(targets, str):
            return targets != "all-linear" and re.fullmatch(targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in targets or ())


def _matched(pattern: Any, module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first key that is a regular expression for the end of the name."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def folder(directory: Path) -> Path:
    """The folder of the adapter: `directory`, or its `adapter` where it is a workdir."""
    inside = directory / "adapter"
    return inside if (inside / FILE).is_file() and not (directory / FILE).is_file() else directory


def read(directory: Path) -> Described:
    """Read and check adapter_config.json.

    Raises:
        InputError: it is missing or damaged, or describes what is not understood, by field.
    """
    path = directory / FILE
    if not path.is_file():
        what = "holds a model, not an adapter" if (directory / "config.json").is_file() else "is no adapter"
        raise InputError(f"{directory} {what}: give the folder that holds {FILE}.")
    given = tensors.read_json(path)
    if given.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type={given.get('peft_type')!r} is not read, only 'LORA'.")
    for field, value in given.items():
        _check_field(path, field, value)
    for field, kind in (("r", int), ("lora_alpha", (int, float))):
        if not isinstance(given.get(field), kind):
            raise InputError(f"{path}: {field}={given.get(field)!r} must be a number.")
    return Described(
        path, given["r"], float(given["lora_alpha"]), float(given.get("lora_dropout") or 0.0),
        bool(given.get("use_rslora")), given,
    )  # fmt: skip


def _check_field(path: Path, field: str, value: Any) -> None:
    if field == "init_lora_weights" and value not in BEGINNINGS:
        raise InputError(
            f"{path}: init_lora_weights={value!r} trains beside a changed base model: convert the adapter by PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), or merge it there and load that model."
        )
    is_neutral = not value or (field == "bias" and value == "none")
    if field not in USED | IRRELEVANT and not is_neutral:
        raise InputError(
            f"{path}: {field}={value!r:.60} is not understood: merge the adapter by PEFT's merge_and_unload() and "
            "load that model."
        )
