# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look inside: which experts process which word
#
# This notebook loads a checkpoint and continues a text. For each token and layer, it shows which
# experts the router chose and how certain it was.
#
# **Status:** run on a CPU. On a TPU or GPU runtime the same cells use the accelerator; for these,
# the model has been compiled, not run.

# %%
# @title Install, once
# @markdown Leave `SOURCE` empty to install from PyPI. Or give a repository (`git+https://…`) or a
# @markdown copy on Drive (`file:///content/drive/MyDrive/…`; mount Drive first).
# @markdown Colab's JAX is older than this needs, so the runtime restarts. Then run this cell again.
import importlib.util
import subprocess
import sys

SOURCE = ""  # @param {type:"string"}
DEVICE = "cpu"  # @param ["cpu", "tpu", "cuda"]
if importlib.util.find_spec("finermoe_jax") is None:
    package = "finermoe-jax" if DEVICE == "cpu" else f"finermoe-jax[{DEVICE}]"
    wanted = f"{package} @ {SOURCE}" if SOURCE else package
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    print("Installed. The runtime restarts; run this cell again.")
    from IPython import get_ipython

    get_ipython().kernel.do_shutdown(restart=True)

# %%
# @title What to look at
# @markdown A checkpoint, a workdir of train.py, a Hugging Face directory or a Hub id. If
# @markdown `runs/demo` does not exist, the demo is trained first: two minutes on two CPU cores.
import os
from pathlib import Path

TINY = False  # @param {type:"boolean"}
CHECKPOINT = "runs/demo"  # @param {type:"string"}
PROMPT = "The following example shows how to"  # @param {type:"string"}
NEW_TOKENS = 24  # @param {type:"integer"}

TINY |= os.environ.get("FINERMOE_TINY") == "1"
if TINY:
    CHECKPOINT, NEW_TOKENS = "runs/tiny", 8

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgba_array

import finermoe_jax as fm
from finermoe_jax.runtime.files import find
from finermoe_jax.training import style
from finermoe_jax.training.run import train
from finermoe_jax.weights.source import open_model, read_model

plt.rcParams.update(style.SETTINGS | {"axes.grid": False})  # its pictures are maps

if CHECKPOINT in ("runs/demo", "runs/tiny") and not list(Path(CHECKPOINT).glob("checkpoints/*")):
    config = fm.preset("configs/demo.py")
    config.prompts = ()
    if TINY:
        config.train.update(steps=6, eval_every=6, checkpoint_every=6)
        config.data.eval_windows = 16
    train(fm.run_config(config.to_dict()), Path(CHECKPOINT))

model = read_model(open_model(CHECKPOINT), CHECKPOINT)
tokenizer = fm.load_tokenizer(CHECKPOINT)
moe = model.config.moe
if moe is None:
    raise SystemExit(f"{CHECKPOINT} is dense; convert_hf.py makes a mixture of it")
layers = model.config.layer_kinds.count("moe")
slots, candidates, group = moe.output_granularity, moe.output_expansion, moe.group_size
print(
    f"{layers} MoE layers, {slots} slots x {candidates} candidate groups x {group} experts, "
    f"{moe.num_active} active"
)

# %% [markdown]
# ## Generate

# %%
prompt_ids = tokenizer([PROMPT], return_tensors="np")["input_ids"]
ids = np.asarray(fm.generate(model, prompt_ids, max_new_tokens=NEW_TOKENS))
print(tokenizer.decode(ids[0]))

# %% [markdown]
# ## One forward pass, and the routers' decisions
#
# `out.routing` has one entry per MoE layer: `logits` [batch, tokens, experts], and `experts` and
# `weights` [batch, tokens, active], the active experts sorted by falling logit.

# %%
out = model(ids)
chosen = np.stack([r.experts[0] for r in out.routing])  # [layers, tokens, active]
weights = np.stack([r.weights[0] for r in out.routing]).astype(np.float32)
probabilities = np.stack([jax.nn.softmax(r.logits[0].astype(jnp.float32)) for r in out.routing])
words = [tokenizer.decode([i]).replace("\n", "\\n").replace(" ", "·") for i in ids[0]]
chosen.shape, weights.shape, probabilities.shape

# %% [markdown]
# **The chosen expert of every token and layer.** One picture per output slot.
#
# - Colour: the group that was kept (blue: candidate 0, orange: candidate 1, …).
# - Number: the expert in the group, which is its slice of the dense FFN (modulo the number of
#   slices, if a group holds copies).
# - Darker: more of the token's routing weight.
# - Black line: the model generated the text to the right of it.

# %%
hues = to_rgba_array(style.LINES)
shown = min(len(words), 40)
figure, panels = plt.subplots(
    slots, 1, figsize=(2.5 + 0.42 * shown, slots * (0.8 + 0.34 * layers)), layout="constrained"
)
for slot, axes in enumerate(np.atleast_1d(panels)):
    here = chosen // (candidates * group) == slot  # [layers, tokens, active]
    best = np.where(here, weights, -1).argmax(-1)[..., None]  # the slot's heaviest expert
    expert = np.take_along_axis(chosen, best, -1)[..., 0]
    share = np.take_along_axis(weights, best, -1)[..., 0]
    hue = hues[expert // group % candidates % len(hues)]
    strength = 0.6 * (share / share.max())[..., None] ** 2
    axes.imshow((1 - (1 - hue) * strength)[:, :shown], aspect="auto")
    for layer, token in np.ndindex(layers, shown):
        number = expert[layer, token] % group
        axes.text(token, layer, number, ha="center", va="center", fontsize=8)
    axes.axvline(prompt_ids.shape[1] - 0.5, color="black")
    axes.set_yticks(range(layers))
    axes.set_ylabel(f"slot {slot}\nlayer")
    axes.set_xticks(range(shown), words[:shown], rotation=60, ha="right", fontsize=9)
plt.show()

# %% [markdown]
# **How certain the router is.** The softmax over all experts of one layer, one row per token.
# Circles mark the active experts. One bright cell in a row is a certain decision. A bright cell
# without a circle is not the best of its group, or its group was not kept because the *sum* of the
# group's logits was smaller.

# %%
layer = layers // 2  # any from 0
figure, axes = plt.subplots(
    figsize=(2 + max(7, 0.1 * moe.num_experts), 1.5 + 0.24 * shown), layout="constrained"
)
image = axes.imshow(probabilities[layer, :shown], aspect="auto", cmap="viridis", vmin=0)
rows = np.repeat(np.arange(shown), moe.num_active)
axes.scatter(chosen[layer, :shown].ravel(), rows, s=40, facecolors="none", edgecolors="white")
for border in range(group, moe.num_experts, group):
    axes.axvline(
        border - 0.5, color="white", linewidth=2 if border % (candidates * group) == 0 else 0.7
    )
axes.set_yticks(range(shown), words[:shown], fontsize=9)
axes.set_xlabel("expert: slots apart by heavy lines, candidate groups by thin ones")
axes.set_title(f"layer {layer}: softmax of the router's logits")
figure.colorbar(image, label="probability")
plt.show()

# %% [markdown]
# ## Over a longer text
#
# The first picture shows each expert's share of the tokens. The second shows, for each pair of
# candidates, the share of tokens for which slot 0 kept the one and slot 1 the other.

# %%
text = find("demo/pydoc_small.txt").read_text()[100_000:104_000]
long = tokenizer([text], return_tensors="np")["input_ids"][:, :512]
experts = np.stack([r.experts[0] for r in model(long).routing])
load = np.stack([np.bincount(e.ravel(), minlength=moe.num_experts) for e in experts])
load = load * moe.num_experts / load.sum(-1, keepdims=True)

figure, axes = plt.subplots(
    figsize=(2 + max(7, 0.1 * moe.num_experts), 1.6 + 0.3 * layers), layout="constrained"
)
image = axes.imshow(
    style.octaves(load),
    aspect="auto",
    cmap=style.load_colours(),
    vmin=-style.OCTAVES,
    vmax=style.OCTAVES,
)
axes.set_facecolor("black")
for border in range(group, moe.num_experts, group):
    axes.axvline(
        border - 0.5, color="black", linewidth=2 if border % (candidates * group) == 0 else 0.7
    )
axes.set_yticks(range(layers))
axes.set_ylabel("layer")
axes.set_xlabel("expert (black: no token)")
style.load_bar(figure, image, axes)
plt.show()

# %%
if slots > 1:
    figure, panels = plt.subplots(
        1,
        layers,
        figsize=(1.2 + 1.9 * layers, 2.6),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for layer, axes in enumerate(panels[0]):
        by_slot = np.sort(experts[layer], axis=-1).reshape(-1, slots, moe.active_per_group)
        candidate = by_slot[..., 0] // group % candidates  # [tokens, slots]
        pairs = np.zeros((candidates, candidates))
        np.add.at(pairs, (candidate[:, 0], candidate[:, 1]), 1 / len(candidate))
        axes.imshow(pairs, vmin=0, vmax=1, cmap="Blues")
        for a, b in np.ndindex(candidates, candidates):
            colour = "white" if pairs[a, b] > 0.5 else "black"
            axes.text(b, a, f"{pairs[a, b]:.0%}", ha="center", va="center", color=colour)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xticks(range(candidates))
        axes.set_yticks(range(candidates))
        axes.set_xlabel("slot 1's candidate")
    panels[0][0].set_ylabel("slot 0's candidate")
    plt.show()

# %% [markdown]
# If the slots decided independently, each cell would be the product of its row's and its column's
# share. A heavy diagonal means that the slots agree. After a short training, the candidates of a
# slot are still nearly copies of each other, so the router's random start is visible.
