"""An audit as words and as a page."""

from collections.abc import Sequence
from typing import Any

from jaxfw.audit.audit import Audit
from jaxfw.report import Bar, Lanes, Table, Text

BARS = 4000  # of a timeline; of a longer run the first ones are drawn
LANES = {"": "kernels", "intra": "in a host", "inter": "between hosts", "host": "host memory"}
KINDS = {"gemm": "matrix product", "kernel": "other kernel", "collective": "collective", "copy": "copy"}


def lines(found: Audit) -> list[str]:
    """A summary for the terminal."""
    account = found.account
    parts = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in account.parts.items())
    verdict = "fits" if account.fits else "does NOT fit"
    said = [
        f"{found.what}, compiled for {found.request.target} in {found.compile_seconds:.1f} s",
        f"  GB a device: {account.total / 1e9:.2f} of {account.capacity / 1e9:.0f}, {verdict} ({parts}, "
        f"temporaries {account.temporaries / 1e9:.2f}, results {account.results / 1e9:.2f})",
        *(f"  {flow.kind} over {flow.axes} ({flow.link}): {flow.times} times, {flow.bytes / 1e9:.3f} GB sent"
          for flow in found.flows),
        f"  kernels: {', '.join(f'{name} {count}' for name, count in found.kernels.items())}",
    ]  # fmt: skip
    said += [f"  gathered whole, for want of a better way: {array}" for array in found.replicated]
    if found.timeline is not None:
        hidden = found.timeline.hidden()
        share = "" if hidden != hidden else f", {hidden:.0%} of the collectives' time hidden"
        said.append(f"  predicted: {1e3 * found.timeline.seconds:.3f} ms{share}")
    return said


def page(found: Audit) -> dict[str, Any]:
    """Contents of the report."""
    account = found.account
    sections: list[Any] = [
        Table(
            "What a device holds",
            ("part", "GB"),
            (*((name, count / 1e9) for name, count in account.parts.items()),
             ("temporaries", account.temporaries / 1e9), ("results", account.results / 1e9),
             ("in all", account.total / 1e9), ("can be used", account.capacity / 1e9)),
            note="Arguments as they are laid out, temporaries as the compiler plans them.",
        ),
        Table("The largest arrays of a device", ("array", "GB"), tuple((n, b / 1e9) for n, b in account.largest)),
        Table(
            "Bytes between devices",
            ("collective", "axes", "link", "times", "sent (GB)"),
            tuple((flow.kind, flow.axes, flow.link, flow.times, flow.bytes / 1e9) for flow in found.flows),
            note="What one device sends: of an all-gather over n devices n - 1 times its input, of a reduce-scatter or "
            "all-to-all (n - 1)/n of it, of an all-reduce twice that.",
        ),
        Table("What does the work", ("kernel", "times"), tuple(found.kernels.items())),
        Table(
            "Which kernel each product and each attention got", ("kernel", "of", "times"),
            tuple((*key, times) for key, times in found.sources.items()),
        ),
    ]  # fmt: skip
    if found.replicated:
        sections.append(Text("Gathered whole, for want of a better way", "\n".join(found.replicated), mono=True))
    if found.timeline is not None:
        sections += _timeline(found)
    return {
        "title": f"{found.request.model or 'The model'} on {found.request.target}",
        "summary": f"{found.what[0].upper()}{found.what[1:]}, compiled for GPUs that are not there. Nothing was timed: "
        "times are predicted by playing the schedule through a model of the machine.",
        "figures": list(found.figures().items()),
        "sections": sections,
    }


def _timeline(found: Audit) -> list[Any]:
    timeline = found.timeline
    assert timeline is not None
    bars = [
        Bar(LANES[span.link], KINDS[span.kind], f"{span.source or span.name}: {1e6 * span.seconds:.1f} us",
            1e3 * span.begin, 1e3 * span.end)
        for span in timeline.spans[:BARS]
    ]  # fmt: skip
    cut = "" if len(timeline.spans) <= BARS else f" The first {BARS:,} of {len(timeline.spans):,} bars."
    rows = [
        (one.kind, one.source or one.name, one.link, one.times, 1e3 * one.begin, 1e6 * one.seconds,
         one.hidden / one.seconds,
         ", ".join(one.beside[:2]) + (f" and {len(one.beside) - 2} more" if len(one.beside) > 2 else ""))
        for one in found.overlaps
    ]  # fmt: skip
    return [
        Lanes(
            "Timeline (predicted)", tuple(bars), "ms",
            note=f"Kernels run in their order, collectives beside them on the streams that XLA gives them.{cut}",
        ),
        Table(
            "What hides collectives (predicted)",
            ("collective", "of", "link", "times", "starts (ms)", "takes (us)", "hidden", "beside it"),
            tuple(rows),
            note="Hidden is the share that runs beside a matrix product or a collective of the other link.",
        ),
    ]  # fmt: skip


def comparison(audits: Sequence[tuple[str, Audit]]) -> Table:
    """Audits side by side."""
    names = list(dict.fromkeys(name for _, one in audits for name in one.figures()))
    rows = tuple((name, *(one.figures().get(name) for name in names)) for name, one in audits)
    return Table("Side by side", ("change", *names), rows, note="Times are predicted.")
