"""How well a model predicts a text: perplexity and bits per byte of a file by a Hugging Face directory.

    python -m jaxfw.launch --config=configs/perplexity.py --config.model=DIR --config.file=FILE --workdir=runs/perp

Time is that of a forward pass over every window: file tokens x context / stride.
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `smoke` (short windows of the first tokens)."""
    args = parse_arg(arg, smoke=False)
    c = ConfigDict()
    c.experiment = "experiments.perplexity"
    c.model = ""  # a Hugging Face model directory
    c.file = ""  # UTF-8 text
    c.adapter = ""  # a PEFT directory for that model
    c.dtype = ""  # float32, bfloat16 or float16; empty means as stored
    c.quantise = ""  # int8 or int4
    c.context = 0  # tokens that a window reads; 0: all that the model has positions for
    c.stride = 0  # tokens that each window scores; 0: half of the context
    c.most_tokens = 0  # of the file, from its beginning; 0: all
    c.batch = 8
    c.chunk = 128  # tokens of a window whose logits exist at once
    if args.smoke:
        c.context = 32
        c.most_tokens = 200
        c.batch = 2
        c.chunk = 16
    return c.lock()
