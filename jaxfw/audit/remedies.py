"""What could be changed so that a program fits: candidates, each compiled before it is named."""

import dataclasses
import math

from jaxfw.audit.audit import Audit, Request, audit
from jaxfw.core import aot
from jaxfw.core.errors import InputError
from jaxfw.core.mesh import parse_mesh

CHUNK = 512  # tokens of a row whose logits exist at once
WANTED = 2


def candidates(request: Request) -> dict[str, Request]:
    """Changes, from the least to the greatest, by what one would write."""
    found: dict[str, Request] = {}

    def offer(name: str, **changes: object) -> None:
        found[name] = dataclasses.replace(request, **changes)  # pyright: ignore[reportArgumentType]

    if request.program == "train":
        if not request.chunk and request.length > CHUNK:
            offer(f"--chunk={CHUNK}", chunk=CHUNK)
        if request.remat != "layer":
            offer(f"--remat=layer --chunk={CHUNK}", remat="layer", chunk=CHUNK)
    elif request.program == "decode" and not request.quantise:
        offer("--quantise=int8", quantise="int8")
        offer("--quantise=int4", quantise="int4")
    if request.program != "train" and request.batch > 1:
        offer(f"--batch={request.batch // 2}", batch=request.batch // 2)
    chip, (slices, hosts, gpus) = aot.parse_target(request.target)
    axis = "fsdp" if request.program == "train" else "tensor"
    changes = {"remat": "layer", "chunk": CHUNK} if request.program == "train" else {}
    axes = parse_mesh(request.mesh)
    for factor in (2, 4, 8, 16):
        devices = slices * hosts * gpus * factor
        shape = f"{chip}:1x{devices}" if devices <= 8 else f"{chip}:{devices // 8}x8"
        sizes = {**axes, axis: axes.get(axis, slices * hosts * gpus if not axes else 1) * factor}
        mesh = ",".join(f"{name}={size}" for name, size in sizes.items())
        batch = request.batch if request.program != "train" else math.lcm(request.batch, devices)
        extra = f" --batch={batch}" if batch != request.batch else ""
        flags = "".join(f" --{name}={value}" for name, value in changes.items())
        offer(f"--target={shape} --mesh={mesh}{extra}{flags}", target=shape, mesh=mesh, batch=batch, **changes)
    return found


def that_fit(request: Request, wanted: int = WANTED) -> dict[str, Audit]:
    """The first candidates that compile and fit."""
    found: dict[str, Audit] = {}
    for name, changed in candidates(request).items():
        try:
            tried = audit(changed)
        except InputError:
            continue  # heads or rows that such a mesh cannot share out
        if tried.account.fits:
            found[name] = tried
        if len(found) == wanted:
            break
    return found


def check_fits(found: Audit) -> None:
    """Refuse what does not fit.

    Raises:
        InputError: with the three largest causes, and two changes that fit, each of which was compiled.
    """
    account = found.account
    if account.fits:
        return
    causes = ", ".join(f"{name} {_gb(count)}" for name, count in account.causes())
    fitting = [f"{name} ({_gb(other.account.total)})" for name, other in that_fit(found.request).items()]
    advice = f"compiled, and fitting: {'; '.join(fitting)}" if fitting else "none of the changes that were tried fits"
    raise InputError(
        f"{found.what} needs {_gb(account.total)} a device, of which {_gb(account.capacity)} can be used: {causes}. "
        f"{advice}."
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
