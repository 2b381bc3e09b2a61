"""The embedded model: a LLaMA of some 4 M parameters with seven abilities, trained from nothing.

    python -m jaxfw.launch --config=configs/embedded.py --workdir=runs/embedded-1
    python -m jaxfw.launch --config=configs/embedded.py:stage=2 --config.init=runs/embedded-1 --workdir=runs/embedded-2

Stage 1 learns to look up what it has read, then the tasks, in rows of 256 tokens; stage 2 goes on with rows of 1,024.
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `stage` (1 or 2), `smoke` (a tiny model, a few steps)."""
    args = parse_arg(arg, stage=1, smoke=False)
    c = ConfigDict()
    c.experiment = "experiments.embedded"
    c.seed = 0
    c.init = ""  # the workdir of the stage before
    c.period = (6, 32) if args.stage == 1 else (6, 256)  # tokens of a repeated segment

    c.rows = ConfigDict()  # shares of the rows of a batch
    c.rows.lessons = 0.7
    c.rows.repeated = 0.2
    c.rows.english = 0.1

    c.lessons = ConfigDict()  # shares of the documents
    c.lessons.statements = 0.15
    c.lessons.facts = 0.2
    c.lessons.composition = 0.12
    c.lessons.arithmetic = 0.12
    c.lessons.code = 0.18
    c.lessons.safety = 0.03
    c.lessons.retrieval = 0.08
    c.lessons.long_output = 0.12
    c.lessons.rule = 0.04

    c.model = ConfigDict()
    c.model.vocab = 1536
    c.model.width = 256
    c.model.ffn = 688
    c.model.layers = 4
    c.model.heads = 4
    c.model.kv_heads = 2
    c.model.head_dim = 64
    c.model.positions = 1280
    c.model.init_std = 0.0625

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1.5e-3 if args.stage == 1 else 1e-3
    c.optimizer.warmup = 100
    c.optimizer.final = 0.05
    c.optimizer.weight_decay = 0.1
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.clip_norm = 1.0

    c.train = ConfigDict()
    c.train.steps = 4000 if args.stage == 1 else 1000
    c.train.batch = 16 if args.stage == 1 else 8
    c.train.length = 256 if args.stage == 1 else 1024
    c.train.log_every = 50
    c.train.evaluate_every = 1000
    c.train.save_every = 500
    c.train.asked = 64
    c.train.final = 500

    if args.smoke:
        c.model.vocab = 400
        c.model.width = 32
        c.model.ffn = 64
        c.model.layers = 2
        c.model.heads = 2
        c.model.kv_heads = 1
        c.model.head_dim = 16
        c.train.steps = 4
        c.train.batch = 8
        c.train.length = 128
        c.train.log_every = 2
        c.train.evaluate_every = 4
        c.train.save_every = 2
        c.train.asked = 4
        c.train.final = 4
        c.optimizer.warmup = 1
    return c.lock()
