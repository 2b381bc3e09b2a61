"""A program for eight devices, one process or two: generation on a mesh beside one device.

Run by tests/test_generate_mesh.py, as jax fixes the number of its devices when it starts: `mesh_generate.py DIR` with a
saved model. It prints one JSON object; of two processes, each its own.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

import jaxfw
from jaxfw.core.distributed import join
from jaxfw.core.mesh import make_mesh

PROMPTS = ["Remove any common leading whitespace", "é", "JSON is a subset", "of the literal syntax"]
NEW = 40  # more than one chunk
DRAWN = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "n": 2}


def found(m):
    """What each way to ask gives: texts and tokens as they are, numbers as floats."""
    beginning = m.prefix("Remove any common", room=96)
    greedy = m.generate(PROMPTS, max_new_tokens=NEW, room=96, details=True)
    return {
        "greedy": [[answer.tokens, answer.text] for answer in greedy],
        "greedy logprobs": [answer.logprobs.tolist() for answer in greedy],
        "three rows": m.generate(PROMPTS[1:], max_new_tokens=4),
        "drawn": m.generate(PROMPTS[:2], max_new_tokens=8, key=jax.random.key(3), **DRAWN),
        "stopped": m.generate(PROMPTS, max_new_tokens=NEW, room=96, stop=greedy[0].text[3:5]),
        "behind a prefix": m.generate([" leading", " x"], max_new_tokens=6, prefix=beginning),
        "scores": [scores.tolist() for scores in m.logprobs(PROMPTS)],
        "scores behind a prefix": [scores.tolist() for scores in m.logprobs([" leading", " x"], prefix=beginning)],
    }


if __name__ == "__main__":
    join()
    sizes = {"tensor": 2, "fsdp": 2, "data": jax.device_count() // 4}
    on_mesh = jaxfw.load(sys.argv[1], mesh=make_mesh(**sizes))  # pyright: ignore[reportArgumentType]
    assert len(on_mesh.params["layers_0"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    shown = {"mesh": found(on_mesh)}
    if jax.process_count() == 1:
        shown["one"] = found(jaxfw.load(sys.argv[1]))
    print(json.dumps(shown))
