"""Configs: strict mini-arguments, strict dataclasses, and a golden copy of what every config file gives."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxfw.core.config import changed_fields, check_override, parse_arg, to_dataclass, to_plain
from jaxfw.core.errors import InputError
from jaxfw.models import DecoderConfig, Rope

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
GOLDENS = ROOT / "tests" / "goldens"
SHARED = dict.fromkeys(("pretrain", "finetune"), "experiments.train")


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_what_its_golden_copy_says(name, arg):
    """A changed default shows up in review. To accept: delete the file and run the test once."""
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    assert config.is_locked
    dump = json.dumps(to_plain(config), indent=1) + "\n"
    golden = GOLDENS / f"{name}{'.' if arg else ''}{arg}.json"
    if not golden.exists():
        golden.write_text(dump, encoding="utf-8")
        pytest.fail(f"{golden} did not exist; it was written")
    assert dump == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_names_a_module_with_run_and_describe(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    experiment = importlib.import_module(config.experiment)
    assert callable(experiment.run) and callable(experiment.describe)
    assert config.experiment == SHARED.get(name, f"experiments.{name}")


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_mini_arguments_are_refused(name):
    with pytest.raises(InputError, match=r"mini-argument='smok' is unknown.*Did you mean 'smoke'"):
        importlib.import_module(f"configs.{name}").get_config("smok")


@pytest.mark.parametrize(
    "arg, message",
    [
        ("depht=2", "mini-argument='depht' is unknown. Known: smoke, depth, lr. Did you mean 'depth'"),
        ("depth=two", "mini-argument depth='two' must be of type int"),
        ("depth", "mini-argument depth='true' must be of type int"),
        ("smoke=maybe", "mini-argument smoke='maybe' must be true or false"),
        ("depth=1,depth=2", "mini-argument 'depth' is given twice"),
    ],
)
def test_bad_mini_arguments(arg, message):
    with pytest.raises(InputError, match=message):
        parse_arg(arg, smoke=False, depth=2, lr=0.1)


def test_mini_arguments_take_the_type_of_their_default():
    args = parse_arg("lr=1,smoke", smoke=False, depth=2, lr=0.1, name="x")
    assert vars(args) == {"smoke": True, "depth": 2, "lr": 1.0, "name": "x"}
    assert isinstance(args.lr, float)


def plain_decoder() -> dict:
    return {"vocab": 8, "width": 4, "ffn": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 2, "positions": 8}


def test_a_nested_config_becomes_nested_dataclasses():
    rope = {"kind": "llama3", "factor": 8, "original_positions": 16}
    config = to_dataclass(DecoderConfig, ConfigDict(plain_decoder() | {"rope": rope}))
    assert config == DecoderConfig(**plain_decoder(), rope=Rope(kind="llama3", factor=8.0, original_positions=16))
    assert hash(config) == hash(dataclasses.replace(config))
    assert isinstance(config.rope.factor, float)


@dataclasses.dataclass(frozen=True)
class Everything:
    number: int
    rate: float
    flag: bool
    name: str | None
    pair: tuple[int, float]
    many: tuple[str, ...]
    inner: Rope | None = None


GOOD = {"number": 1, "rate": 2, "flag": False, "name": None, "pair": [1, 2], "many": ["a"]}


def test_values_are_brought_to_their_field_types():
    made = to_dataclass(Everything, GOOD)
    assert made == Everything(1, 2.0, False, None, (1, 2.0), ("a",))
    assert isinstance(made.rate, float) and isinstance(made.pair[1], float)
    assert to_dataclass(Everything, GOOD | {"inner": {"theta": 5}}).inner == Rope(theta=5.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"number": 1.5}, r"config.number=1.5 must be int"),
        ({"number": True}, r"config.number=True must be int"),
        ({"rate": "fast"}, r"config.rate='fast' must be float"),
        ({"flag": 1}, r"config.flag=1 must be bool"),
        ({"name": 3}, r"config.name=3 must be str"),
        ({"pair": (1, 2, 3)}, r"config.pair=\(1, 2, 3\) must be tuple\[int, float\]"),
        ({"many": "abc"}, r"config.many='abc' must be tuple\[str, ...\]"),
        ({"many": ["a", 1]}, r"config.many\[1\]=1 must be str"),
        ({"inner": {"tehta": 1}}, r"config.inner: field='tehta' is unknown.*Did you mean 'theta'"),
        ({"inner": {"kind": "yarn"}}, r"rope.original_positions=None is needed"),
        ({"numbr": 1}, r"config: field='numbr' is unknown.*Did you mean 'number'"),
    ],
)
def test_values_of_other_types_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        to_dataclass(Everything, GOOD | change)


def test_missing_fields_are_named():
    with pytest.raises(InputError, match="config lacks rate, name, which Everything needs"):
        to_dataclass(Everything, {k: v for k, v in GOOD.items() if k not in ("rate", "name")})


def test_overrides_are_checked_before_they_are_read():
    config = ConfigDict({"lr": 0.1, "model": {"layers": 2}})
    check_override(config, "model.layers")
    with pytest.raises(InputError, match=r"--config.model.layer: field of config.model='layer' is unknown.*'layers'"):
        check_override(config, "model.layer")
    with pytest.raises(InputError, match=r"--config\.lr is a value, not a group"):
        check_override(config, "lr.peak")


TREES = st.recursive(
    st.integers() | st.text(max_size=3) | st.none(), lambda x: st.dictionaries(st.sampled_from("abc"), x), max_leaves=8
)


@given(st.dictionaries(st.sampled_from("abc"), TREES), st.dictionaries(st.sampled_from("abc"), TREES))
def test_changed_fields_are_empty_exactly_for_equal_configs(old, new):
    def flat(tree, prefix=""):
        found = {}
        for name, value in tree.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    assert not changed_fields(old, old)
    if flat(old) != flat(new):
        assert changed_fields(old, new)


def test_plain_is_what_json_has():
    config = ConfigDict({"a": (1, 2), "b": {"c": None}})
    assert to_plain(config) == json.loads(json.dumps(to_plain(config))) == {"a": [1, 2], "b": {"c": None}}
