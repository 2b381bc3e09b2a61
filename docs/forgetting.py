# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a model forgets when its cache is compressed
#
# Compressing a KV cache saves memory. What does it cost? Here: methods by name, what they keep, what the first token
# hides, and an ability measured with its interval. It runs on two CPU cores in two minutes, without a download, on the
# small model that comes with jaxfw; with your own checkpoint, set `MODEL` to its directory.

# %%
import subprocess
import sys

REPOSITORY = "https://github.com/YOUR_FORK/jaxfw"
if "google.colab" in sys.modules:
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, "/content/jaxfw"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "/content/jaxfw"], check=True)
    sys.path.insert(0, "/content/jaxfw")

# %%
import matplotlib.pyplot as plt
import numpy as np

import jaxfw
from jaxfw.evals import TASKS, items, paired_difference
from jaxfw.evals.evaluate import evaluate
from jaxfw.generate import engine
from jaxfw.generate.prompts import bucket, pack_units
from jaxfw.kv import METHODS, parse

MODEL = "embedded-1"
m = jaxfw.load(MODEL)
list(METHODS)

# %% [markdown]
# ## A prompt, and what stays of it
#
# Sixteen lines say which animal belongs to which name; the question asks for one of them. A quarter of the tokens may
# stay. Each line is a unit: ShotKV keeps lines whole or not at all, the others choose tokens.

# %%
item = items(TASKS["retrieval"], n=1, level=16, seed=3)[0]
print(item.prompt, "->", item.answer)
ends = np.cumsum([len(line) for line in item.context.splitlines(keepends=True)])
lines = [(int(begin), int(end)) for begin, end in zip([0, *ends[:-1]], ends)]
shown = ("streaming", "knorm", "snapkv(w=4)", "h2o", "tova", "chunkkv(w=4)", "shotkv")
for method in shown:
    answer = m.generate(item.prompt, kv=f"{method}@keep=0.25", units=[lines], max_new_tokens=12, stop="\n")
    print(f"{method:14}{answer}")

# %% [markdown]
# The cache itself says which positions it holds, in each layer and head: the shading is the share of them.


# %%
def kept(method: str) -> np.ndarray:
    """Of each token of the prompt, the share of layers and heads that hold it."""
    ids = m.tokenizer.encode(item.prompt)
    units = pack_units([m.tokenizer.unit_ids(item.prompt, lines)], [ids], bucket(len(ids)))
    policy = parse(f"{method}@keep=0.25", layers=m.config.layers)
    _, cache = engine.read(m.config, m.params, [ids], policy=policy, room=bucket(len(ids)) + 1, new=1, units=units)
    held = np.stack([np.asarray(state.kept_positions)[0] for state in cache.layers])  # [L K S]
    return (held[..., None] == np.arange(len(ids))).any(axis=2).mean(axis=(0, 1))


picture = np.stack([kept(method) for method in shown])
figure, axes = plt.subplots(figsize=(9, 2.6))
axes.imshow(picture, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
axes.set_yticks(range(len(shown)), shown)
axes.set_xlabel("position in the prompt")
plt.show()

# %% [markdown]
# ## The first token hides the loss
#
# All of these methods compress after the prompt was read, so the first new token is drawn from the full cache, whatever
# the method: a table of one-letter answers would show no loss at all. `protocol="refeed"` reads the prompt's last token
# again through the compressed cache; `"ctx"` compresses the lines alone and reads the question through them.

# %%
task, few = TASKS["retrieval"], {"n": 24, "level": 16, "batch": 24}
full = evaluate(m, task, **few)
print(f"{'full cache':14}{full.accuracy.value:.2f}")
for method in ("knorm", "snapkv(w=4)", "shotkv"):
    for protocol in ("full", "refeed", "ctx"):
        found = evaluate(m, task, kv=f"{method}@keep=0.4", protocol=protocol, **few)
        print(f"{method:14}{protocol:8}{found.accuracy.value:.2f}")

# %% [markdown]
# ## An ability, with its interval
#
# Differences to the full cache are paired: the same items, so that what makes items hard for both does not count.

# %%
for keep in (0.5, 0.3, 0.15):
    found = evaluate(m, task, kv=f"snapkv(w=4)@keep={keep}", protocol="refeed", **few)
    change = paired_difference(full.shares, found.shares)
    interval = f"[{change.low:+.2f}, {change.high:+.2f}]"
    print(f"keep {keep}: {found.accuracy.value:.2f}, change {change.value:+.2f} {interval}")

# %% [markdown]
# ## Bytes
#
# A state has as many slots as it keeps, and everything that describes them is counted.

# %%
ids = m.tokenizer.encode(item.prompt)
for kv in ("knorm@keep=1", "snapkv(w=4)@keep=0.25", "pyramidkv(w=4)@keep=0.25"):
    _, cache = engine.read(
        m.config, m.params, [ids], policy=parse(kv, layers=m.config.layers), room=bucket(len(ids)) + 1, new=1
    )
    print(f"{kv:26}{cache.nbytes:9,} bytes")

# %% [markdown]
# The whole study, with seven abilities, 24 methods and three protocols, is
# `python -m jaxfw.launch --config=configs/kv.py --workdir=runs/kv`; `docs/kv.md` has the methods and their rules.
