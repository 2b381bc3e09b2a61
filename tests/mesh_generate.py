"""What generation on a mesh must agree on with one device; as a program, on all devices of one process or several.

Run by tests/test_generate_mesh.py: `mesh_generate.py DIR` with a saved model prints one JSON object.
"""

import json
import sys

import jax

import jaxfw
from jaxfw.core.distributed import join
from jaxfw.core.mesh import make_mesh

PROMPTS = ["Remove any common leading whitespace", "é", "JSON is a subset", "of the literal syntax"]
NEW = 34  # more than one chunk
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
    m = jaxfw.load(sys.argv[1], mesh=make_mesh(tensor=2, fsdp=2, data=2))
    assert len(m.params["layers_0"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    print(json.dumps(found(m)))
