"""The audit: what a device holds beside arithmetic, traffic by axis and link, remedies that fit, command and page."""

import dataclasses
import graphlib
import json
import re
from pathlib import Path

import jax
import pytest

from experiments import overlap, plans
from jaxfw.audit.__main__ import main, parser, request_of
from jaxfw.audit.audit import Audit, Request, audit
from jaxfw.audit.options import SETS, parse_options
from jaxfw.audit.remedies import candidates, check_fits
from jaxfw.audit.traffic import axes_of, link_of
from jaxfw.audit.warnings import compiler_log, replicated
from jaxfw.core import aot
from jaxfw.core.errors import InputError
from jaxfw.core.mesh import parse_mesh
from jaxfw.models import DecoderConfig, MoEConfig
from jaxfw.models.accounting import parameter_bytes, parameter_count, train_memory

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
TINY = DecoderConfig(
    vocab=512, width=256, ffn=512, layers=2, heads=4, kv_heads=2, head_dim=64, positions=1024, dtype="bfloat16"
)
TRAIN = Request(config=TINY, target="h200:2x2", mesh="data=2,fsdp=2", batch=4, length=512, stacked=False)


@pytest.fixture(scope="module")
def training() -> Audit:
    return audit(TRAIN)


# --- what a device holds


@pytest.mark.slow
@needs_compiler
def test_experts_of_a_capacity_have_less_to_do():
    config = dataclasses.replace(TINY, layers=1, moe=MoEConfig(experts=8, per_token=2, ffn=256))
    free = Request(config=config, target="h200:1x1", mesh="fsdp=1", batch=2, length=512)
    limited = dataclasses.replace(free, capacity=1.25)
    predicted = [found.timeline.seconds for found in (audit(limited), audit(free)) if found.timeline]
    assert predicted[0] < 0.5 * predicted[1]


@needs_compiler
def test_arguments_are_accounted_for_by_name(training):
    parts = training.account.parts
    assert parts["parameters"] == pytest.approx(parameter_bytes(TINY) / 2, rel=0.001), "all but norms are cut in two"
    assert parts["optimiser"] == pytest.approx(2 * parts["parameters"], abs=16)
    assert parts["batch"] == 513 * 4 and parts.get("other arguments", 0) < 100
    assert training.account.total == sum(parts.values()) + training.account.results + training.account.temporaries
    assert len(training.account.largest) == 8 and all(len(name) < 90 for name, _ in training.account.largest)
    assert training.account.causes(1) == [("temporaries", training.account.temporaries)]
    assert training.account.fits and training.account.capacity == int(0.95 * 150e9)


MEMORY = [
    ("llama-3.1-8b", "h200:1x8", 8, 8, 4096, "", "layer", 512),
    ("llama-3.1-8b", "h200:1x8", 8, 16, 4096, "float32/bfloat16", "none", 0),
    ("qwen2.5-7b", "h200:1x8", 8, 16, 2048, "", "products", 512),
    ("llama-3.1-70b", "h200:8x8", 64, 64, 4096, "", "layer", 512),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("model, target, devices, batch, length, dtypes, remat, chunk", MEMORY)
def test_compiled_bytes_are_those_of_arithmetic(model, target, devices, batch, length, dtypes, remat, chunk):
    request = Request(model=model, target=target, batch=batch, length=length, dtypes=dtypes, remat=remat, chunk=chunk)
    expected = train_memory(
        request.decoder, rows=batch // devices, length=length, shards=devices,
        remat=None if remat == "none" else remat, chunk=chunk or None,
    )  # fmt: skip
    found = audit(request).account
    assert found.total == pytest.approx(sum(expected.values()), rel=0.15)
    assert found.parts["parameters"] == pytest.approx(expected["parameters"], rel=0.005)


# --- bytes between devices


@needs_compiler
def test_traffic_is_told_by_axis_and_link(training):
    kinds = {(flow.kind, flow.axes, flow.link) for flow in training.flows}
    assert ("all-gather", "fsdp", "intra") in kinds, "parameters, inside of a host"
    assert ("all-reduce", "data", "inter") in kinds, "gradients, between hosts"
    sent = sum(flow.bytes for flow in training.flows if flow.axes == "data")
    weights = parameter_count(TINY) - TINY.vocab * TINY.width
    assert sent == pytest.approx(2 * weights / 2, rel=0.01), "gradients in 16 bits, a half of them, 2 (n - 1) / n of it"
    assert training.kernels["cuDNN attention"] >= 2 * TINY.layers
    assert any(kernel == "product fused by XLA" and "mlp/up" in part for kernel, part in training.sources)


@needs_compiler
def test_groups_are_named_by_the_axes_along_which_they_lie():
    mesh = aot.cluster("h200:2x4", data=2, fsdp=2, tensor=2)
    assert [axes_of(group, mesh) for group in ([0, 1], [0, 2], [0, 4], [0, 1, 2, 3], [3])] == [
        "tensor", "fsdp", "data", "fsdp+tensor", "-",
    ]  # fmt: skip
    assert [link_of(group, mesh) for group in ([0, 3], [3, 4])] == ["intra", "inter"]


# --- predicted


@needs_compiler
def test_the_timeline_is_as_long_as_its_parts(training):
    timeline = training.timeline
    kernels, collectives = timeline.busy("gemm", "kernel"), timeline.busy("collective")
    assert max(kernels, collectives / 2) <= timeline.seconds <= kernels + collectives
    assert sum(one.times for one in training.overlaps) == sum(flow.times for flow in training.flows)
    assert {one.link for one in training.overlaps} == {"intra", "inter"}
    assert all(0 <= one.hidden <= one.seconds * (1 + 1e-9) for one in training.overlaps)
    assert any("dot_general" in name for one in training.overlaps for name in (one.source, *one.beside))


@needs_compiler
def test_options_change_the_schedule_and_unknown_ones_are_named(training):
    other = audit(dataclasses.replace(TRAIN, options="overlap"))
    assert other.timeline.seconds != training.timeline.seconds
    with pytest.raises(InputError, match="xla_gpu_no_such_option.*jax " + jax.__version__):
        audit(dataclasses.replace(TRAIN, options="xla_gpu_no_such_option=1"))


@needs_compiler
@pytest.mark.parametrize("program", ["decode", "prefill"])
def test_other_programs(program):
    found = audit(dataclasses.replace(TRAIN, program=program, mesh="tensor=2", target="h200:1x2"))
    assert found.account.parts["parameters"] > 0 and found.kernels
    assert ("cache" in found.account.parts) == (program == "decode")
    assert any(flow.kind == "all-reduce" and flow.axes == "tensor" for flow in found.flows)


@needs_compiler
@pytest.mark.parametrize("chip", ["h100", "a100"])
def test_other_chips(chip):
    found = audit(dataclasses.replace(TRAIN, program="decode", mesh="", target=f"{chip}:1x1"))
    assert found.account.capacity < 85e9 and found.timeline is None, "their rates are not known"


# --- what does not fit


@pytest.mark.slow
@needs_compiler
def test_too_large_is_refused_with_causes_and_changes_that_fit():
    request = Request(model="llama-3.1-8b", target="h200:1x1", batch=8, length=8192)
    found = audit(request)
    with pytest.raises(InputError) as caught:
        check_fits(found)
    said = str(caught.value)
    for name, count in found.account.causes():
        assert f"{name} {count / 1e9:.1f} GB" in said
    remedies = said.split("compiled, and fitting: ")[1].rstrip(".").split("; ")
    assert len(remedies) == 2
    for remedy in remedies:
        flags, _, size = remedy.rpartition(" (")
        again = request_of(parser().parse_args(
            ["--model=llama-3.1-8b", "--target=h200:1x1", "--batch=8", "--length=8192", *flags.split()]
        ))  # fmt: skip
        checked = audit(again).account
        assert checked.fits and f"{checked.total / 1e9:.1f} GB)" == size


def test_candidates_keep_what_was_asked_and_grow():
    request = Request(config=TINY, target="h200:1x8", mesh="fsdp=8", batch=8, length=1024)
    found = candidates(request)
    assert list(found)[:2] == ["--chunk=512", "--remat=layer --chunk=512"]
    sizes = [aot.parse_target(other.target)[1] for other in found.values()]
    assert sizes[-4:] == [(1, 2, 8), (1, 4, 8), (1, 8, 8), (1, 16, 8)]
    assert all(parse_mesh(other.mesh)["fsdp"] in (8, 16, 32, 64, 128) for other in found.values())
    decoding = candidates(dataclasses.replace(request, program="decode", mesh=""))
    assert list(decoding)[:3] == ["--quantise=int8", "--quantise=int4", "--batch=4"]


# --- the command


@pytest.mark.slow
@needs_compiler
def test_the_command_compares_and_leaves_a_page(tmp_path, capsys):
    out = tmp_path / "audit"
    words = ["--config=configs/quickstart.py:smoke", "--target=h200:1x2", f"--workdir={out}", "--compare=remat=layer"]
    assert main([*words, "--search=chunk=0,32"]) == 0
    said = capsys.readouterr().out
    assert "compiled for h200:1x2" in said and "GB a device" in said and "best: " in said
    found = json.loads((out / "results.json").read_text())
    assert set(found["audits"]) == {"as asked", "remat=layer", "chunk=0", "chunk=32"}
    assert found["request"]["target"] == "h200:1x2" and found["environment"]["versions"]["jax"]
    page = (out / "report.html").read_text()
    assert "Timeline (predicted)" in page and "Nothing was timed" in page and "<rect" in page


WRONG = [
    ([], "--model is missing: name a preset"),
    (["--model=llama-9"], "--model='llama-9' is unknown"),
    (["--model=llama-3.1-8b", "--target=z80:1x8"], "target chip='z80' is unknown. Known: h200, h100, a100"),
    (["--model=llama-3.1-8b", "--target=h200:8"], "target='h200:8' must be chip:HOSTSxGPUS"),
    (["--model=llama-3.1-8b", "--mesh=fsdp=4"], "mesh fsdp=4 needs 4 devices, there are 8"),
    (["--model=llama-3.1-8b", "--mesh=color=8"], "color"),
    (["--model=llama-3.1-8b", "--program=dance"], "--program='dance' is unknown. Known: train, decode, prefill"),
    (["--model=llama-3.1-8b", "--remat=some"], "--remat='some' is unknown"),
    (["--model=llama-3.1-8b", "--batch=7"], "batch=7 rows cannot be shared out over 8 devices"),
    (["--model=llama-3.1-8b", "--batch=many"], "--batch='many' must be a whole number from 1 on"),
    (["--model=llama-3.1-8b", "--length=1000000"], "length=1000000 must be from 1 to the model's 131072 positions"),
    (["--model=llama-3.1-8b", "--stacked=maybe"], "--stacked='maybe' must be true or false"),
    (["--model=llama-3.1-8b", "--capacity=1.25"], "--capacity=1.25 is of experts, and this model has none"),
    (["--model=mixtral-8x7b", "--capacity=0.000001"], "--capacity=1e-06 must be at least"),
    (["--model=mixtral-8x7b", "--capacity=1.25", "--program=decode"], "is for training: decode drops nothing"),
    (["--model=mixtral-8x7b", "--capacity=much"], "--capacity='much' must be a number from 0 on"),
    (["--model=llama-3.1-8b", "--options=fast"], "--options='fast' is unknown. Known: none, schedule, overlap"),
    (["--model=llama-3.1-8b", "--compare=colour=red"], "flag='colour' is unknown"),
    (["--model=llama-3.1-8b", "--search=remat"], "--search='remat' must be FLAG=VALUE,VALUE"),
    (["--config=configs/perplexity.py"], "--model is missing"),
]


@pytest.mark.parametrize("words, message", WRONG, ids=lambda value: str(value)[:50])
def test_what_cannot_be_compiled_is_named(capsys, words, message):
    if aot.missing() is not None and "mesh" in message:
        pytest.skip(str(aot.missing()))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@needs_compiler
def test_the_page_on_it_runs():
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    held: dict = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S)), held)
    assert held["timeline"].seconds > 0 and held["compiled"].bytes.total > 0
    for line in re.findall(r"^python -m jaxfw\.audit (.*)$", page, flags=re.M):
        assert request_of(parser().parse_args(line.split())).target.startswith("h200:")


def test_a_missing_plugin_is_told_with_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(aot, "missing", lambda: "jax's CUDA plugin is missing: pip install 'jaxfw[aot]'.")
    aot._devices.cache_clear()
    assert main(["--model=llama-3.1-8b"]) == 2
    assert "cannot compile for h200: jax's CUDA plugin is missing: pip install 'jaxfw[aot]'" in capsys.readouterr().err
    aot._devices.cache_clear()


def test_sets_of_options_know_their_versions(monkeypatch):
    assert parse_options("a=1;b=true;c=x") == {"a": 1, "b": True, "c": "x"}
    assert set(parse_options("schedule")) < set(parse_options("overlap"))
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(InputError, match=r"--options=overlap-links needs jax 0\.11 or newer"):
        parse_options("overlap-links")
    with pytest.raises(InputError, match="'b' is not option=value"):
        parse_options("a=1;b")
    assert "none" in SETS


def test_what_the_compiler_says_is_kept_from_the_terminal(capfd):
    import os

    line = (
        "W1130 17:16:20.264190    8471 spmd_partitioner.cc:656] [SPMD] Involuntary full rematerialization. The "
        "compiler cannot go from sharding {a} to {b} for HLO operation %copy.3 = bf16[1,512,2048]{2,1,0} copy(%x), "
        'metadata={op_name="jit(step)/embed"}. As the last resort, SPMD will replicate the tensor.'
    )
    with compiler_log() as said:
        os.write(2, f"{line}\nsomething else\n".encode())
    assert len(said) == 1 and replicated(said) == ["jit(step)/embed: bf16[1,512,2048]"]
    assert capfd.readouterr().err == "something else\n"


def test_the_page_has_the_committed_figures():
    """docs/audit.md on the expert layer, beside the independent replay's figures."""
    found = json.loads((ROOT / "experiments" / "results" / "overlap.json").read_text(encoding="utf-8"))["variants"]
    page = " ".join((ROOT / "docs" / "audit.md").read_text(encoding="utf-8").split())
    rows = [found[name] for name in ("default", "options", "edges_options")]
    times = [f"{row['ours']['one_stream_per_link']['ms']:.2f} ms" for row in rows]
    assert all(time in page for time in times)
    hidden = [round(100 * row["ours"]["one_stream_per_link"]["hidden"]) for row in rows]
    assert f"{hidden[0]}, {hidden[1]} and {hidden[2]} % is hidden" in page
    for row in rows[:2]:
        assert row["ours"]["one_stream_per_link"]["ms"] == pytest.approx(row["theirs"]["ms"], rel=0.05)


def test_what_fits_is_what_was_compiled():
    found = json.loads(plans.RESULT.read_text(encoding="utf-8"))
    assert plans.PAGE.read_text(encoding="utf-8") == plans.page(found)
    assert [len(found[name]) for name in ("training", "decoding")] == [
        len(list(requests())) for requests in (plans.training, plans.decoding)
    ]


def test_order_edges_give_an_order_or_none():
    edges = frozenset({((1, "there"), (0, "experts")), ((0, "scatter"), (2, "gather"))})
    order = overlap.ordered(edges)
    assert sorted(order) == sorted(overlap.NODES)
    assert all(order.index(first) < order.index(second) for first, second in edges)
    with pytest.raises(graphlib.CycleError):
        overlap.ordered(frozenset({((1, "back"), (0, "there")), ((0, "back"), (1, "there"))}))
