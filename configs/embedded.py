"""The embedded model: a LLaMA of some 4 M parameters with seven abilities, trained from nothing (`make embedded`).

    python -m jaxfw.launch --config=configs/embedded.py:stage=1 --workdir=runs/stage-1
    python -m jaxfw.launch --config=configs/embedded.py:stage=2 --config.init=runs/stage-1 --workdir=runs/stage-2
    python -m jaxfw.launch --config=configs/embedded.py:stage=3 --config.init=runs/stage-2 --workdir=runs/stage-3

Stage 1 repeats random segments and asks for the values of keys, from which a model learns to look up what it has read;
stage 2 has the lessons in rows of 256 tokens, stage 3 in rows of 1,024.
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg
from jaxfw.core.errors import InputError


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `stage` (1 to 3), `smoke` (a tiny model, a few steps)."""
    args = parse_arg(arg, stage=1, smoke=False)
    if args.stage not in (1, 2, 3):
        raise InputError(f"mini-argument stage={args.stage} must be 1, 2 or 3.")

    def by_stage(*values):
        return values[args.stage - 1]

    c = ConfigDict()
    c.experiment = "experiments.embedded"
    c.seed = 0
    c.init = ""  # the workdir of the stage before
    c.period = by_stage((6, 32), (6, 64), (6, 256))  # tokens of a repeated segment
    c.least_distinct = by_stage(0, 4, 4)  # different tokens in it, few as often as many; 0 asks nothing

    c.rows = ConfigDict()  # shares of the rows of a batch
    c.rows.lessons = by_stage(0.05, 0.8, 0.8)
    c.rows.repeated = by_stage(0.6, 0.06, 0.05)
    c.rows.recall = by_stage(0.3, 0.04, 0.05)
    c.rows.english = by_stage(0.05, 0.1, 0.1)

    c.lessons = ConfigDict()  # shares of the documents
    c.lessons.statements = by_stage(0.12, 0.12, 0.08)
    c.lessons.facts = 0.14
    c.lessons.composition = 0.12
    c.lessons.arithmetic = 0.14
    c.lessons.code = 0.18
    c.lessons.safety = 0.08
    c.lessons.retrieval = 0.1
    c.lessons.long_output = 0.12
    c.lessons.rule = by_stage(0.06, 0.06, 0.1)

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
    c.optimizer.learning_rate = by_stage(2e-3, 1.5e-3, 1e-3)
    c.optimizer.warmup = 100
    c.optimizer.final = by_stage(0.5, 0.1, 0.05)
    c.optimizer.weight_decay = 0.1
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.clip_norm = 1.0

    c.train = ConfigDict()
    c.train.steps = by_stage(600, 3000, 400)
    c.train.batch = by_stage(64, 16, 8)
    c.train.length = by_stage(64, 256, 1024)
    c.train.log_every = 25
    c.train.evaluate_every = by_stage(600, 500, 200)
    c.train.save_every = by_stage(300, 500, 200)
    c.train.asked = by_stage(32, 64, 64)
    c.train.final = by_stage(32, 100, 500)

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
