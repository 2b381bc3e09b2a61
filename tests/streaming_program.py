"""A program for processes of their own: what loading and saving hold in memory, alone and together, and being killed.

Run by tests/test_streaming.py: `streaming_program.py CASE ARGUMENTS`.
"""

import gc
import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from jaxfw.core.mesh import make_mesh
from jaxfw.models import DecoderConfig, forward
from jaxfw.weights import load, save, saving, tensors

BIG = dict(vocab=32768, width=1024, ffn=4096, heads=16, kv_heads=16, head_dim=64, positions=64)
TINY = DecoderConfig(vocab=64, width=16, ffn=24, layers=1, heads=4, kv_heads=2, head_dim=4, positions=64)


def big(dtype):
    """A configuration of more than 1 GiB."""
    return DecoderConfig(**BIG, layers=13 if dtype == "float32" else 28, param_dtype=dtype, dtype=dtype)


def numbers(config, scale=1.0):
    """Parameters that differ from place to place, made quickly, at the host."""
    from jaxfw.weights.arrays import abstract_params

    def of(number, leaf):
        period = np.sin(np.arange(10007 + number) * scale).astype(leaf.dtype)
        return np.resize(period, leaf.shape)

    leaves, tree = jax.tree.flatten(abstract_params(config))
    return jax.tree.unflatten(tree, [of(number, leaf) for number, leaf in enumerate(leaves)])


def anonymous():
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


class Peak:
    """The most anonymous memory while it is open."""

    def __enter__(self):
        self.bytes, self.ended = anonymous(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.bytes, anonymous())


def warm(folder, mesh=None):
    """Everything that a first save, load and run leave in memory."""
    tiny = load(save(Path(folder) / "tiny", TINY, numbers(TINY)), mesh=mesh)
    with jax.set_mesh(mesh or make_mesh()):
        jax.block_until_ready(jax.jit(forward, static_argnums=0)(tiny.config, tiny.params, np.ones((1, 4), np.int32)))
    gc.collect()


def make(directory, dtype, shard_bytes):
    config = big(dtype)
    save(directory, config, numbers(config), shard_bytes=int(shard_bytes))


def load_and_save(directory, folder, quantise=""):
    """Both ways, and whether what was saved is what was loaded."""
    warm(folder)
    before = anonymous()
    with Peak() as loading:
        read = load(directory, quantise=quantise or None)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(read.params))
    report = {"load": loading.bytes - before - held, "bytes": held}
    report["largest"] = max(leaf.nbytes for leaf in jax.tree.leaves(read.params))
    if not quantise:
        before = anonymous()
        with Peak() as writing:
            save(Path(folder) / "again", read.config, read.params)
        report["save"] = writing.bytes - before
    print(json.dumps(report))


def together(port, number, directory, folder):
    """Two processes, a half of each matrix in each; then one directory again."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    read, asked = tensors.Reader.read, []

    def counted(self, name, index):
        found = read(self, name, index)
        asked.append(found.nbytes)
        return found

    mesh = make_mesh(tensor=2)
    warm(folder, mesh)
    tensors.Reader.read = counted
    before = anonymous()
    with Peak() as loading:
        model = load(directory, mesh=mesh)
    leaves = jax.tree.leaves(model.params)
    report = {
        "held": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "read": sum(asked),
        "peak": loading.bytes - before,
        "bytes": sum(leaf.nbytes for leaf in leaves),
    }
    save(Path(folder) / "again", model.config, model.params, attributes=model.attributes)
    refusals = []
    for target in (Path(folder) / "again", directory):
        try:
            save(target, model.config, model.params)
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    print(json.dumps(report | {"refusals": refusals}))


def killed(directory, after):
    """Dies without a word when so many parameters are written (-1: when all are, before the directory has its name)."""
    written, write, sync = [], saving._write_parameter, saving._sync

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(*arguments):
        write(*arguments)
        written.append(1)
        if len(written) == int(after):
            die()

    saving._write_parameter = write_and_die
    saving._sync = lambda folder: die() if int(after) < 0 else sync(folder)
    save(directory, TINY, numbers(TINY), shard_bytes=4096)


def saves(folder):
    """One directory after the other, until it is killed."""
    params = numbers(TINY)
    print("ready", flush=True)
    for number in itertools.count():
        save(Path(folder) / str(number), TINY, params, shard_bytes=4096)


if __name__ == "__main__":
    {case.__name__: case for case in (make, load_and_save, together, killed, saves)}[sys.argv[1]](*sys.argv[2:])
