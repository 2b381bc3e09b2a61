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
# # A tour of jaxfw
#
# A model of your own in half a minute, then what the framework does with any model: ask it, look inside, change what
# its cache keeps, quantise it, lay it out on a cluster, train it, and give it back as a Hugging Face directory.
# Everything runs on two CPU cores without a download; with your own checkpoint, set `MODEL` to its directory.
#
# In Colab, the next cell installs jaxfw and keeps Colab's jax; elsewhere it does nothing.

# %%
import subprocess
import sys

REPOSITORY = "https://github.com/YOUR_FORK/jaxfw"
if "google.colab" in sys.modules:
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, "/content/jaxfw"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "/content/jaxfw"], check=True)
    sys.path.insert(0, "/content/jaxfw")

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxfw

MODEL = None  # a Hugging Face directory of yours; None trains a small one here

# %% [markdown]
# ## A model
#
# Experiments are functions first and commands second. This is the main job of the README, in its smoke size: a
# tokenizer is trained on the documentation strings of Python's standard library, then a LLaMA of a few thousand
# parameters.

# %%
from configs import quickstart
from experiments.quickstart import run

scratch = Path(tempfile.mkdtemp())
if MODEL is None:
    config = quickstart.get_config("smoke")
    config.documents, config.model.width, config.model.ffn, config.model.vocab = 2000, 64, 160, 512
    config.train.steps, config.train.evaluate_every, config.train.save_every = 1000, 500, 1000
    result = run(config, scratch / "run")
    MODEL = scratch / "run" / "model"
m = jaxfw.load(MODEL)
m.config

# %% [markdown]
# ## Ask it
#
# Greedy unless you give a temperature. A row draws with its own key: the same text alone and in any batch.

# %%
print(m.generate("Return the", max_new_tokens=24))
print(m.generate(["Return the", "Raises a"], max_new_tokens=24, temperature=0.7, key=jax.random.key(1)))

# %%
first, second = m.generate("Return the", n=2, temperature=1.0, stop="\n", details=True, max_new_tokens=24)
first.text, first.finish_reason, float(np.mean(first.logprobs))

# %% [markdown]
# What many prompts share is read once. A cache is a value: it can be kept, copied, and continued any number of times.

# %%
shared = m.prefix("Return the number of items in the list. ")
m.generate(["Raises", "If"], prefix=shared, max_new_tokens=8)

# %% [markdown]
# ## Look inside
#
# A tap names a site in the model and says what to collect or to change there (docs/taps.md has all sites). Here is
# the logit lens: what each layer would answer if it were the last one.

# %%
from jaxfw.models import Collect, Edit

text = "Return the number of"
tokens = jnp.array([m.tokenizer.encode(text)])
out = jaxfw.forward(m.config, m.params, tokens, taps=[Collect("resid/out")])
layers = out.taps[0]  # [L 1 T D]
lens = jax.vmap(lambda x: jaxfw.head(m.config, m.params, x))(layers)[:, 0]
chosen = jax.nn.log_softmax(lens[:, :-1]).max(-1)

figure, axis = plt.subplots(figsize=(7, 2.2))
image = axis.imshow(chosen, aspect="auto", cmap="viridis")
axis.set(xlabel="token", ylabel="layer", title="log-probability of each layer's likeliest next token")
axis.set_yticks(range(len(chosen)))
axis.set_xticks(range(tokens.shape[1] - 1), [m.tokenizer.decode([int(id_)]) for id_ in tokens[0, :-1]])
figure.colorbar(image)
figure.tight_layout()

# %% [markdown]
# The same sites can be edited, in prompts and while generating. An edit is data: its value can be differentiated and
# mapped.

# %%
direction = layers[-1, 0, -1] / jnp.linalg.norm(layers[-1, 0, -1])
for strength in (0.0, 40.0):
    edit = Edit("resid/out", strength * direction, op="add", layers=(0, 0))
    print(strength, repr(m.generate("This", taps=[edit], max_new_tokens=12)))

# %% [markdown]
# ## Change what the cache keeps
#
# A cache policy is a value as well. How many bytes does each keep of a text, and how often does the model still
# choose the same next token?

# %%
from jaxfw.models.cache import FullCache, Int8Cache, RandomCache, RingCache

tokens = jnp.array([m.tokenizer.encode("Return a list of the names. " * 12)[:128]])


def read(policy):
    """Bytes of the cache after half of the text, and the choices in the other half."""
    half, given = tokens.shape[1] // 2, {"policy": policy, "key": jax.random.key(0)}
    cache = jaxfw.forward(m.config, m.params, tokens[:, :half], room=tokens.shape[1], **given).cache
    logits = jaxfw.forward(m.config, m.params, tokens[:, half:], cache=cache, **given).logits
    return sum(x.nbytes for x in jax.tree.leaves(cache.layers)), logits[0].argmax(-1)


_, reference = read(FullCache())
for policy in (FullCache(), Int8Cache(), RingCache(32), RandomCache(32)):
    size, choices = read(policy)
    print(f"{policy!s:28} {size:8,} bytes   same choice {float((choices == reference).mean()):.0%}")

# %% [markdown]
# ## Fewer bits
#
# Matrices can be loaded in 8 or 4 bits. Nothing is held in full on the way: a model that only fits when quantised
# loads.

# %%
for bits in (None, "int8", "int4"):
    loaded = jaxfw.load(MODEL, quantise=bits)
    size = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    print(f"{bits or 'as stored':10} {size:10,} bytes   {-loaded.logprobs(text * 4).mean():.4f} nats a token")

# %% [markdown]
# ## Published sizes, and a cluster that is not here
#
# Presets have the sizes of published models. What would a device hold of one on eight GPUs?

# %%
from jaxfw.core.mesh import abstract_mesh
from jaxfw.core.sharding import table
from jaxfw.models.presets import preset
from jaxfw.models.sharding import decoder_rules

config = preset("qwen3-30b-a3b")
shapes = jax.eval_shape(lambda: jaxfw.init(config, jax.random.key(0)))
held = table(decoder_rules(config), abstract_mesh(expert=4, tensor=2), shapes)
f"{held.bytes / 2**30:.1f} GiB in all, {held.bytes_per_device / 2**30:.1f} GiB a device"

# %% [markdown]
# ## Another architecture
#
# A configuration is a frozen value; every family is a setting of its switches. Here the same size as a mixture of
# experts, trained for a few steps with router balance by bias, without a loss for it.

# %%
import optax

from jaxfw.models import MoEConfig
from jaxfw.models.routing import TokenChoice
from jaxfw.train import NextTokenLoss, init_state, make_step

moe = dataclasses.replace(m.config, moe=MoEConfig(experts=8, per_token=2, ffn=32, shared=32), tie_embeddings=False)
router = TokenChoice(2, scores="sigmoid", bias_rate=0.01)
loss = NextTokenLoss(moe, router=router)
params = jaxfw.init(moe, jax.random.key(0), router=router)
optimizer = optax.adamw(1e-2)
state = init_state(params, optimizer, state=loss.init_state())
step = make_step(loss, optimizer)
ids = np.array(m.tokenizer.encode("Return the number of items in the list, or raise an error. " * 40))
losses = []
for i in range(30):
    starts = np.random.default_rng(i).integers(0, len(ids) - 33, 8)
    batch = {"tokens": jnp.array([ids[start : start + 33] for start in starts])}
    state, metrics = step(state, batch, jax.random.key(0))
    losses.append(float(metrics["train/loss"]))
losses[0], losses[-1]

# %% [markdown]
# ## Give it back
#
# What is saved is what the Hub holds: transformers loads it. `python -m jaxfw.weights inspect DIR` shows any
# directory.

# %%
from jaxfw import weights

directory = m.save(scratch / "copy")
again = weights.load(directory)
assert jax.tree.all(jax.tree.map(np.array_equal, again.params, m.params))
sorted(path.name for path in directory.iterdir())
