"""Train a decoder from scratch on your own text.

    python -m jaxfw.launch --config=configs/pretrain.py --config.data=FILES --workdir=runs/pretrain
    python -m jaxfw.launch --config=configs/pretrain.py:smoke --workdir=runs/smoke      # on documentation of Python

FILES is a text, JSON lines or parquet file, a folder or glob of them, or a folder of tokens that
`python -m jaxfw.data prepare` wrote. The model is 22 M parameters with a vocabulary of 16,384; on a mesh:
--config.mesh=fsdp=8. `--dry-run` says what it takes.
"""

from ml_collections import ConfigDict

from configs.finetune import get_config as finetune
from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `smoke` (a tiny model, a few steps, on text that is at hand)."""
    args = parse_arg(arg, smoke=False)
    c = finetune()
    c.unlock()
    c.tokenizer = "train"  # a byte-pair vocabulary of model.vocab from the data; or a directory with one
    c.reading.packing = "stream"

    c.model = ConfigDict()
    c.model.vocab = 16384
    c.model.width = 384
    c.model.ffn = 1024
    c.model.layers = 10
    c.model.heads = 6
    c.model.kv_heads = 2
    c.model.head_dim = 64
    c.model.positions = 1024
    c.model.tie_embeddings = True
    c.model.init_std = 0.05

    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup = 200
    c.optimizer.weight_decay = 0.1
    c.train.steps = 5000
    c.train.length = 512
    c.train.batch = 32

    if args.smoke:
        c.data = "documentation"
        c.model.vocab = 320
        c.model.width = 32
        c.model.ffn = 64
        c.model.layers = 2
        c.model.heads = 2
        c.model.kv_heads = 1
        c.model.head_dim = 16
        c.model.init_std = 0.18
        c.optimizer.learning_rate = 2e-2
        c.optimizer.warmup = 5
        c.train.steps = 40
        c.train.batch = 8
        c.train.length = 64
        c.train.log_every = 5
        c.train.evaluate_every = 20
        c.train.save_every = 20
        c.train.validation_batches = 2
    return c.lock()
