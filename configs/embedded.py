"""The embedded model: a LLaMA of some 4 M parameters with seven abilities, trained from nothing (`make embedded`).

    python -m jaxfw.launch --config=configs/embedded.py:stage=1 --workdir=runs/stage-1
    python -m jaxfw.launch --config=configs/embedded.py:stage=2 --config.init=runs/stage-1 --workdir=runs/stage-2
    ... and so on to stage 4

Stage 1 repeats random segments, from which a model learns to look up what it has read; stage 2 has the lessons in rows
of 256 tokens; stage 3 gives values to keys and asks for them, which some of the lessons need; stage 4 has rows of 1,024
tokens.
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg
from jaxfw.core.errors import InputError


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `stage` (1 to 4), `smoke` (a tiny model, a few steps)."""
    args = parse_arg(arg, stage=1, smoke=False)
    if args.stage not in (1, 2, 3, 4):
        raise InputError(f"mini-argument stage={args.stage} must be 1, 2, 3 or 4.")

    def by_stage(*values):
        return values[args.stage - 1]

    c = ConfigDict()
    c.experiment = "experiments.embedded"
    c.seed = 0
    c.init = ""  # the workdir of the stage before
    c.period = by_stage((6, 32), (6, 64), (6, 64), (6, 256))  # tokens of a repeated segment

    c.least_distinct = by_stage(0, 0, 4, 4)  # different tokens in it, few as often as many; 0 asks nothing

    c.rows = ConfigDict()  # shares of the rows of a batch
    c.rows.lessons = by_stage(0.05, 0.8, 0.45, 0.75)
    c.rows.repeated = by_stage(0.9, 0.08, 0.05, 0.05)
    c.rows.recall = by_stage(0.0, 0.0, 0.45, 0.1)
    c.rows.english = by_stage(0.05, 0.12, 0.05, 0.1)

    c.lessons = ConfigDict()  # shares of the documents
    c.lessons.statements = by_stage(0.15, 0.15, 0.08, 0.08)
    c.lessons.facts = by_stage(0.2, 0.2, 0.1, 0.1)
    c.lessons.composition = by_stage(0.12, 0.12, 0.1, 0.1)
    c.lessons.arithmetic = by_stage(0.12, 0.12, 0.08, 0.08)
    c.lessons.code = by_stage(0.18, 0.18, 0.22, 0.22)
    c.lessons.safety = by_stage(0.03, 0.03, 0.02, 0.02)
    c.lessons.retrieval = by_stage(0.08, 0.08, 0.22, 0.22)
    c.lessons.long_output = by_stage(0.12, 0.12, 0.14, 0.14)
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
    c.optimizer.learning_rate = by_stage(2e-3, 1.5e-3, 1.5e-3, 1e-3)
    c.optimizer.warmup = 100
    c.optimizer.final = by_stage(0.5, 0.05, 0.5, 0.05)
    c.optimizer.weight_decay = 0.1
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.clip_norm = 1.0

    c.train = ConfigDict()
    c.train.steps = by_stage(600, 3000, 700, 500)
    c.train.batch = by_stage(64, 16, 16, 8)
    c.train.length = by_stage(64, 256, 256, 1024)
    c.train.log_every = 25
    c.train.evaluate_every = 1000
    c.train.save_every = 500
    c.train.asked = by_stage(32, 64, 64, 64)
    c.train.final = by_stage(32, 100, 32, 500)

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
