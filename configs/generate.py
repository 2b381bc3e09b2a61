"""Ask a Hugging Face directory: continue prompts, say how likely they were, and how fast it went.

    python -m jaxfw.launch --config=configs/generate.py --config.model=DIR --workdir=runs/answers
    ... --config.prompts="('Once upon a time', 'In 1905')" --config.temperature=0.8

Loading takes the time of reading the files once; `--config.dtype=bfloat16` halves the memory of float32 weights.
"""

from ml_collections import ConfigDict

from jaxfw.core.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Mini-arguments: `smoke` (short prompts and few tokens)."""
    args = parse_arg(arg, smoke=False)
    c = ConfigDict()
    c.experiment = "experiments.generate"
    c.model = ""  # a Hugging Face model directory
    c.dtype = ""  # float32, bfloat16 or float16; empty means as stored
    c.prompts = ("Return the number of", "Raises a ValueError if", "This module")
    c.new_tokens = 64
    c.temperature = 0.0  # 0 is greedy
    c.top_p = 1.0
    c.seed = 0
    c.timed_batches = (1, 8)
    c.timed_prompt = 256
    if args.smoke:
        c.new_tokens = 8
        c.timed_batches = (1,)
        c.timed_prompt = 32
    return c.lock()
