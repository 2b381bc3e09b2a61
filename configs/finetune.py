"""Fine-tune a Hugging Face model directory on your own text or conversations.

    python -m jaxfw.launch --config=configs/finetune.py --config.init=DIR --config.data=FILE --workdir=runs/tuned
    ...:lora                        # adapters only; --config.quantise=int4 holds the base in 4 bits
    ...:lora,chat                   # JSON lines of {"messages": [...]}: the loss is on the assistant's turns

What comes out: WORKDIR/model (or WORKDIR/adapter, for PEFT), metrics.jsonl, tb/, checkpoints/, report.html. The same
command goes on from the newest checkpoint. On a mesh: --config.mesh=fsdp=8.
"""

from ml_collections import ConfigDict, config_dict

from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `lora`, `chat`, `smoke` (a few short steps)."""
    args = parse_arg(arg, lora=False, chat=False, smoke=False)
    c = ConfigDict()
    c.experiment = "experiments.train"
    c.seed = 0
    c.init = ""  # a model directory, or a workdir with a model
    c.resume = ""  # a workdir whose newest checkpoint to go on from, where this one has none
    c.data = ""  # a file, folder or glob of text, JSON lines or parquet; a folder of tokens; a data set of the Hub
    c.validation = ""  # likewise; empty: every held_out-th document
    c.tokenizer = ""  # a directory; empty: that of init
    c.mesh = ""  # fsdp=8, or data=2,tensor=4, ...: as many devices as there are
    c.param_dtype = "float32"  # of what is trained and averaged
    c.dtype = ""  # of the arithmetic: bfloat16 on a GPU; empty: as the model is stored
    c.quantise = ""  # int8 or int4: of the base under adapters
    c.stack_layers = False  # compile one layer for all: for deep models
    c.model = config_dict.placeholder(object)

    c.reading = ConfigDict()
    c.reading.column = "messages" if args.chat else "text"
    c.reading.chat = args.chat
    c.reading.packing = "documents"  # masked from each other; or "stream": windows of one stream of all
    c.reading.held_out = 20

    c.lora = config_dict.placeholder(object)
    if args.lora:
        c.lora = ConfigDict()
        c.lora.rank = 16
        c.lora.alpha = 32.0
        c.lora.dropout = 0.0
        c.lora.targets = "all"  # qv, attention, all, or a regular expression for whole paths of kernels

    c.loss = ConfigDict()
    c.loss.chunk = 0  # tokens of a row whose logits exist at once; 0: all
    c.loss.remat = ""  # what a layer does not keep for its gradient: see jaxfw.train.NextTokenLoss
    c.loss.router_losses = ()  # (("balance", 0.01),) for a mixture

    c.optimizer = ConfigDict()
    c.optimizer.kind = "adamw"  # or muon, sgd
    c.optimizer.learning_rate = 2e-4 if args.lora else 2e-5
    c.optimizer.warmup = 10
    c.optimizer.schedule = "cosine"  # or linear, constant, wsd (with `decay`, the share of updates in which it falls)
    c.optimizer.final = 0.1
    c.optimizer.decay = 0.2
    c.optimizer.weight_decay = 0.0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.momentum = 0.95  # of muon and sgd
    c.optimizer.clip_norm = config_dict.placeholder(float)
    c.optimizer.clip_norm = 1.0  # None never clips
    c.optimizer.accumulate = 1  # batches an update
    c.optimizer.freeze = config_dict.placeholder(str)  # a regular expression for whole paths of parameters
    c.optimizer.average = config_dict.placeholder(float)  # 0.999, say: what is saved is an average of the parameters

    c.train = ConfigDict()
    c.train.steps = 0  # 0: as many as `epochs` passes over the data need
    c.train.epochs = 3.0
    c.train.batch = 8
    c.train.length = 512
    c.train.log_every = 10
    c.train.evaluate_every = 100
    c.train.save_every = 100
    c.train.keep = 2
    c.train.validation_batches = 8

    if args.smoke:
        c.train.steps = 6
        c.train.batch = 4
        c.train.length = 32
        c.train.log_every = 2
        c.train.evaluate_every = 3
        c.train.save_every = 3
        c.train.validation_batches = 1
        c.optimizer.warmup = 1
    return c.lock()
