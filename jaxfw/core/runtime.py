"""The process and its machine: the compilation cache, and what a result must say about where it was made."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "jaxfw", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tokenizers",
    "transformers", "torch",
)  # fmt: skip
CODE = ("jaxfw", "pallas_kernels", "configs", "experiments", "pyproject.toml", ":(exclude)experiments/results")


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs between processes; returns the folder, None where jax has the cache switched off.

    `JAX_COMPILATION_CACHE_DIR` says where (by default `~/.cache/jaxfw`), `JAX_ENABLE_COMPILATION_CACHE=0` switches off.
    """
    import jax

    if not jax.config.jax_enable_compilation_cache:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    folder = Path(given or home / "jaxfw" / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def environment() -> dict[str, Any]:
    """Command, time, versions, commit and machine, as plain JSON values. Initialises jax's devices."""
    import jax

    devices = jax.devices()
    return {
        "command": command(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": commit(),
        "machine": machine(),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def command() -> str:
    """The command line of this process as a user would type it again."""
    words = getattr(sys, "orig_argv", sys.argv)
    return shlex.join(["python", *words[1:]])


def commit() -> str | None:
    """The checkout's commit, with `-modified` where its code differs; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", *CODE], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-modified" if changes.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in bytes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {"cpu": models[0] if models else platform.processor(), "cores": cores, "memory_bytes": pages}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
