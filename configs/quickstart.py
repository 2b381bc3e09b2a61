"""The main job: abilities of the embedded model, then a LLaMA of 1.2 M parameters that learns to write documentation.

    python -m jaxfw.launch --config=configs/quickstart.py --workdir=runs/quickstart
    python -m jaxfw.launch --config=configs/quickstart.py:smoke --workdir=runs/smoke

Two quiet CPU cores: a minute of training, a minute and a half in all; the smoke run takes 20 seconds. The flag that you
will want: --config.train.steps=2000.
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `smoke` (a tiny model, a few steps)."""
    args = parse_arg(arg, smoke=False)
    c = ConfigDict()
    c.experiment = "experiments.quickstart"
    c.seed = 0
    c.documents = 0  # how many of the documents; 0 means all
    c.baseline = "bigram"  # what the model must beat on held-out text: bigram or unigram

    c.abilities = ConfigDict()
    c.abilities.model = "embedded-1"  # or a Hugging Face directory
    c.abilities.tasks = ("facts", "composition", "arithmetic", "code", "safety", "retrieval", "long_output")
    c.abilities.asked = 100
    c.abilities.question = "627 + 485"

    c.model = ConfigDict()
    c.model.vocab = 1024
    c.model.width = 160
    c.model.ffn = 432
    c.model.layers = 4
    c.model.heads = 5
    c.model.kv_heads = 1
    c.model.head_dim = 32
    c.model.positions = 1024
    c.model.tie_embeddings = True
    c.model.init_std = 0.08  # 1 / sqrt(width)

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 6e-3
    c.optimizer.warmup = 40
    c.optimizer.final = 0.1  # of the peak learning rate, at the end of the cosine
    c.optimizer.weight_decay = 0.1
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.clip_norm = 1.0

    c.train = ConfigDict()
    c.train.steps = 600
    c.train.batch = 8
    c.train.length = 128
    c.train.log_every = 5
    c.train.evaluate_every = 50
    c.train.save_every = 100
    c.train.validation_batches = 8

    c.generate = ConfigDict()
    c.generate.prompts = ("Return the number of", "Raises a ValueError if", "This module")
    c.generate.new_tokens = 64
    c.generate.temperature = 0.7

    if args.smoke:
        c.documents = 300
        c.abilities.tasks = ("facts", "arithmetic")
        c.abilities.asked = 12
        c.baseline = "unigram"
        c.model.vocab = 320
        c.model.width = 32
        c.model.ffn = 64
        c.model.layers = 2
        c.model.heads = 2
        c.model.head_dim = 16
        c.model.init_std = 0.18
        c.optimizer.learning_rate = 2e-2
        c.optimizer.warmup = 5
        c.train.steps = 60
        c.train.length = 64
        c.train.evaluate_every = 20
        c.train.save_every = 20
        c.generate.new_tokens = 16
    return c.lock()
