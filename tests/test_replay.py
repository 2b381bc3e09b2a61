"""The replay beside an independent one of three compiled programs, and beside makespans worked out by hand."""

import json
from pathlib import Path

import pytest

from jaxfw.core.errors import InputError
from jaxfw.core.replay import PROFILES, Link, Profile, replay

FIXTURES = Path(__file__).parent / "fixtures" / "audit"
FIGURES = json.loads((FIXTURES / "figures.json").read_text())["variants"]
# A byte takes a second everywhere, a multiplication or addition too; collectives of 8 bytes over 2 devices: see below.
SLOW = Profile(inter=Link(0, 1), intra=Link(0, 1), host=Link(0, 1), flops=1, memory=1, launch=0)
INTRA, INTER = "replica_groups={{0,1},{2,3}}", "replica_groups={{0,2},{1,3}}"


@pytest.mark.parametrize("streams, key", [("link", "one_stream_per_link"), ("one", "one_stream")])
@pytest.mark.parametrize("variant", FIGURES)
def test_compiled_layers_take_as_long_and_hide_as_much(variant, streams, key):
    text, expected = (FIXTURES / f"{variant}.hlo.txt").read_text(), FIGURES[variant][key]
    found = replay(text, PROFILES["h200"], gpus_per_host=8, streams=streams)
    assert found.seconds * 1e3 == pytest.approx(expected["ms"], rel=0.05)
    shares = [found.hidden(), found.hidden("inter"), found.hidden("intra")]
    assert shares == pytest.approx([expected[name] for name in ("hidden", "inter", "intra")], abs=0.03)
    assert found.busy("collective") * 1e3 == pytest.approx(FIGURES[variant]["comm_ms"], abs=0.03)
    assert found.busy("gemm") * 1e3 == pytest.approx(FIGURES[variant]["gemm_ms"], abs=0.03)
    assert found.busy("gemm", "kernel") * 1e3 == pytest.approx(FIGURES[variant]["comp_ms"], abs=0.03)


def module(*entry, more=""):
    """A program that takes %p, of 8 bytes."""
    lines = "\n".join(f"  {line}" for line in ("%p = f32[2]{0} parameter(0)", *entry))
    return f"HloModule m, is_scheduled=true\n\n{more}\nENTRY %main (p: f32[2]) -> f32[2] {{\n{lines}\n}}\n"


def kernel(name, *operands):
    """16 seconds: 8 bytes in, 8 out."""
    return f"%{name} = f32[2]{{0}} copy(%{operands[0] if operands else 'p'})"


def start(name, operand, groups, kind="all-to-all"):
    """All-to-all over two devices sends half of 8 bytes: 4 seconds."""
    return f"%{name} = ((f32[2]{{0}}), f32[2]{{0}}) {kind}-start(%{operand}), {groups}, dimensions={{0}}"


def done(name, started, kind="all-to-all"):
    return f"%{name} = f32[2]{{0}} {kind}-done(%{started})"


DOT = (
    "%a = f32[2,3]{1,0} parameter(1)", "%b = f32[3,2]{1,0} parameter(2)",
    "%d = f32[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
)  # fmt: skip
LOOP = """
%body (s: f32[2]) -> f32[2] {
  %s = f32[2]{0} parameter(0)
  %c = ((f32[2]{0}), f32[2]{0}) all-to-all-start(%s), replica_groups={{0,1}}, dimensions={0}
  %e = f32[2]{0} all-to-all-done(%c)
  ROOT %k = f32[2]{0} copy(%e)
}

%condition (s: f32[2]) -> pred[] {
  %s.1 = f32[2]{0} parameter(0)
  ROOT %t = pred[] constant(true)
}
"""
WHILE = "%w = f32[2]{0} while(%p), condition=%condition, body=%body"
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'
WRAPPED = """
%wrapped (x: f32[2]) -> f32[1] {
  %x = f32[2]{0} parameter(0)
  ROOT %r = f32[1]{0} reduce-scatter(%x), replica_groups={{0,2}}, dimensions={0}, to_apply=%add
}
"""
ASYNC = (
    "%c = ((f32[2]{0}), f32[1]{0}) async-start(%p), calls=%wrapped", kernel("k"), "%e = f32[1]{0} async-done(%c)",
)  # fmt: skip
BRANCHES = """
%one (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  ROOT %k1 = f32[2]{0} copy(%x)
}

%two (y: f32[2]) -> f32[2] {
  %y = f32[2]{0} parameter(0)
  %k2 = f32[2]{0} copy(%y)
  ROOT %k3 = f32[2]{0} copy(%k2)
}
"""
HIDDEN = (start("c", "p", INTRA), kernel("k"), done("e", "c"))
HIDDEN_BY_A_PRODUCT = (start("c", "p", INTRA), *DOT, done("e", "c"))

PROGRAMS = [
    ("one kernel after the other", [kernel("k"), kernel("l", "k")], {}, 32),
    ("a product costs its operations", list(DOT), {}, 64),  # 24 operations, but 16 + 24 + 24 bytes
    ("serial", [kernel("k"), start("c", "k", INTRA), done("e", "c"), kernel("l", "e")], {}, 16 + 4 + 16),
    ("perfect overlap", HIDDEN, {}, 16),
    ("a collective begins where it stands", [kernel("k"), start("c", "p", INTRA), done("e", "c")], {}, 20),
    ("two links", [start("c", "p", INTRA), start("f", "p", INTER), done("e", "c"), done("g", "f")], {}, 4),
    ("two links on one stream", [start("c", "p", INTRA), start("f", "p", INTER), done("e", "c"), done("g", "f")],
     {"streams": "one"}, 8),
    ("streams as they are named", [start("c", "p", INTRA), start("f", "p", INTRA), start("g", "p", INTER)],
     {"streams": {"c": "0", "f": "1", "g": "1"}}, 8),
    ("one link twice", [start("c", "p", INTRA), start("f", "p", INTRA), done("e", "c"), done("g", "f")], {}, 8),
    ("kernels wait for one", [start("c", "p", INTRA).replace("-start", "") + ', backend_config={"is_sync":true}',
                              kernel("k")], {}, 20),
    ("nobody waits for the last one", [kernel("k"), start("c", "p", INTRA)], {}, 20),
    ("a loop of known length", [WHILE + KNOWN], {"more": LOOP}, 5 * (4 + 16)),
    ("a loop of given length", [WHILE], {"more": LOOP, "unknown_trips": 3}, 3 * (4 + 16)),
    ("an async wrapper", ASYNC, {"more": WRAPPED}, 16),
    ("the longer branch", ["%q = s32[] constant(0)", "%r = f32[2]{0} conditional(%q, %p, %p), "
     "branch_computations={%one, %two}"], {"more": BRANCHES}, 32),
    ("a call", ["%r = f32[2]{0} call(%p), to_apply=%two"], {"more": BRANCHES}, 32),
    ("to the host and back", ["%c = (f32[2]{0}, f32[2]{0}, u32[]) copy-start(%p)", kernel("k"),
     "%e = f32[2]{0} copy-done(%c)"], {}, 16),
    ("all-gather", [start("c", "p", INTRA, "all-gather"), done("e", "c", "all-gather")], {}, 8),
    ("all-reduce of four", [start("c", "p", "replica_groups=[1,4]<=[4]", "all-reduce"), done("e", "c", "all-reduce")],
     {}, 2 * 3 / 4 * 8),
    ("names and groups of transposed devices", [start("c", "p", "replica_groups=[2,2]<=[2,2]T(1,0)"), done("e", "c")],
     {}, 4),
]  # fmt: skip


@pytest.mark.parametrize("name, entry, options, seconds", PROGRAMS, ids=[row[0] for row in PROGRAMS])
def test_makespans_worked_out_by_hand(name, entry, options, seconds):
    options = {"streams": "link"} | dict(options)
    text = module(*entry, more=options.pop("more", ""))
    assert replay(text, SLOW, gpus_per_host=2, **options).seconds == pytest.approx(seconds)


def test_only_products_and_other_links_hide_a_collective():
    timeline = replay(module(*HIDDEN), SLOW, gpus_per_host=2, streams="link")
    assert timeline.hidden() == 0 and timeline.hidden("intra") == 0
    timeline = replay(module(*HIDDEN_BY_A_PRODUCT), SLOW, gpus_per_host=2, streams="link")
    assert timeline.hidden() == 1
    both = [start("c", "p", INTRA), start("f", "p", INTER), done("e", "c"), done("g", "f")]
    assert replay(module(*both), SLOW, gpus_per_host=2, streams="link").hidden("inter") == 1
    assert replay(module(*both), SLOW, gpus_per_host=2, streams="one").hidden() == 0
    (span,) = [span for span in timeline.spans if span.kind == "collective"]
    assert [other.name for other in timeline.during(span)] == ["d"]


@pytest.mark.parametrize(
    "entry, options, message",
    [
        (["%c = f32[2]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add"], {}, "c (all-reduce in main) has no"),
        (["%c = f32[2]{0} frobnicate(%p)"], {}, "c is 'frobnicate', which moves 8 bytes at an unknown cost"),
        (['%c = f32[2]{0} custom-call(%p), custom_call_target="mystery"'], {}, "c calls 'mystery', whose cost"),
        ([WHILE], {"more": LOOP}, "w is a loop whose length the compiler does not know: give unknown_trips="),
        ([done("e", "p")], {}, "e (all-to-all-done) waits for p, which was not started"),
        (["%c = f32[2]{0} send-start(%p)"], {}, "c is 'send-start', beside kernels at an unknown cost"),
        ([start("c", "p", "channel_id=1")], {}, "a collective names no devices"),
        ([], {"streams": "two"}, "streams='two' is unknown"),
        ([], {"gpus_per_host": 0}, "gpus_per_host=0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_would_give_a_wrong_figure_is_refused(entry, options, message):
    options = {"gpus_per_host": 2} | options
    with pytest.raises(InputError) as caught:
        replay(module(*entry, more=options.pop("more", "")), SLOW, **options)
    assert message in str(caught.value)


def test_a_kernel_that_starts_beside_others_is_played_in_turn():
    doubled = "%doubled (x: f32[2]) -> f32[2] {\n  %x = f32[2]{0} parameter(0)\n  ROOT %y = f32[2]{0} add(%x, %x)\n}\n"
    begun = "%f = ((f32[2]{0}), f32[2]{0}, s32[]) fusion-start(%p), kind=kLoop, calls=%doubled"
    text = module(begun, kernel("k"), "%g = f32[2]{0} fusion-done(%f)", more=doubled)
    assert replay(text, SLOW, gpus_per_host=2).seconds == 16 + 16
