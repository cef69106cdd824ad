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
# # Your own layer
#
# Another routing rule is a subclass of a few lines. Here are two, upcycled from the same dense
# model as FineRMoE itself, trained on the same tokens, their losses side by side. Change them, or
# write a third.
#
# **Compiled, not run, on a TPU.** This notebook was run on a CPU. The library's own layer was
# compiled for TPUs; a layer of yours is plain JAX around the same kernels, and was not.

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
# @title How long
import os

TINY = False  # @param {type:"boolean"}
STEPS = 60  # @param {type:"integer"}

TINY |= os.environ.get("FINERMOE_TINY") == "1"
if TINY:
    STEPS = 4

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.data.batches import open_data, train_batches
from finermoe_jax.data.tokenizers import load_tokenizer
from finermoe_jax.evaluation.evaluate import held_out_loss
from finermoe_jax.layers.parameters import kinds
from finermoe_jax.moe.routing import route
from finermoe_jax.runtime.files import find
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import rebuild, train_step

# %% [markdown]
# ## Two variants
#
# `route(x)` of the layer returns each token's experts and weights, and the order that sorts them
# by output slot. Everything else (dispatch, the experts' kernels, the shared expert, the
# load-balancing loss, the gradients) stays as it is.
#
# **Independent slots.** FineRMoE takes one softmax over the experts of *all* slots: what one slot
# gains, the other loses. Here each slot's expert is weighted by the sigmoid of its own logit.


# %%
class IndependentSlots(fm.FineRMoE):
    """Weights that do not compete across slots."""

    def route(self, x):
        routing, slot_order = super().route(x)
        chosen = jnp.take_along_axis(routing.logits, routing.experts, axis=-1)
        return routing._replace(weights=jax.nn.sigmoid(chosen).astype(x.dtype)), slot_order


# %% [markdown]
# **One level.** FineRMoE keeps, for each slot, the group with the largest *sum* of logits, and
# takes the best expert of that group. Here the best expert of a slot is taken, wherever it lies.
# Experts are numbered by slot, candidate, copy and slice, so this is the library's own rule for
# one candidate group with as many more copies.


# %%
class OneLevel(fm.FineRMoE):
    """The best experts of each slot, without candidate groups."""

    def route(self, x):
        logits = super().route(x)[0].logits
        one_group = dataclasses.replace(
            self.moe,
            output_expansion=1,
            intermediate_expansion=self.moe.output_expansion * self.moe.intermediate_expansion,
        )
        return route(logits, one_group, x.dtype)


# %% [markdown]
# ## Upcycle
#
# The layers share all weights of the start: `with_layer` gives a model another layer, and copies
# nothing.

# %%
config = fm.preset("configs/demo.py")
config.train.update(steps=STEPS)
config.data.update(global_batch_size=8, eval_windows=16)
run = fm.run_config(config.to_dict())

base = find(run.init_from)
dense = fm.load_hf(base, dtype="float32")
start = fm.upcycle_model(dense, run.moe, jax.random.key(run.train.seed))
layers = {"FineRMoE": fm.FineRMoE, "independent slots": IndependentSlots, "one level": OneLevel}
models = {name: fm.with_layer(start, layer) for name, layer in layers.items()}

# %% [markdown]
# How far apart are they before a single step? The share of tokens whose experts differ from
# FineRMoE's.

# %%
tokenizer = load_tokenizer(base, dense.config.vocab_size)
text = open_data(run.data, tokenizer, base, dense.config.vocab_size)
rows = range(run.data.global_batch_size)
tokens = next(train_batches(text.train, run.data, 0, rows)).tokens[:, :-1]
chosen = {name: np.stack([r.experts for r in m(tokens).routing]) for name, m in models.items()}
for name, experts in chosen.items():
    differ = (np.sort(experts) != np.sort(chosen["FineRMoE"])).any(-1).mean()
    print(f"{name:20} {differ:6.1%}")

# %% [markdown]
# ## Train
#
# The library's own step: loss, Eq. 11, clipping, AdamW. Every model sees the same batches.


# %%
def fit(model: fm.Decoder) -> tuple[fm.Decoder, list[float]]:
    """The trained model, and the loss of each step."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    tx = optimizer(run.optimizer, run.train.steps, kinds(model))
    moments = tx.init(params)
    step = jax.jit(lambda p, m, batch: train_step(graphdef, run, tx, p, m, batch))
    losses = []
    batches = train_batches(text.train, run.data, 0, rows)
    for _, batch in zip(range(run.train.steps), batches):
        params, moments, metrics = step(params, moments, batch)
        losses.append(float(metrics["loss"]))
    return rebuild(graphdef, params), losses


def score(model: fm.Decoder) -> float:
    """Mean loss on held-out text, nats per token."""
    return held_out_loss(model, text.held_out, run.data.eval_windows, chunk_tokens=1024)


curves, scores = {}, {}
for name, model in models.items():
    before = score(model)
    models[name], curves[name] = fit(model)
    scores[name] = score(models[name])
    print(f"{name:20} held-out loss {before:.4f} → {scores[name]:.4f}")

# %% [markdown]
# The batches differ more than the layers do. So below: each one's loss minus FineRMoE's on the same
# batch.

# %%
figure, (top, below) = plt.subplots(2, 1, figsize=(7.5, 6), sharex=True, layout="constrained")
steps = np.arange(1, STEPS + 1)
for name, losses in curves.items():
    top.plot(steps, losses, label=f"{name}: held-out {scores[name]:.3f}")
    below.plot(steps, np.subtract(losses, curves["FineRMoE"]))
top.set_ylabel("training loss, nats per token")
top.legend(frameon=False)
below.set_ylabel("minus FineRMoE's")
below.set_xlabel("step")
below.xaxis.get_major_locator().set_params(integer=True)
for axes in (top, below):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# One seed and a few steps on one megabyte of text say whether a layer trains, not which is better.
# For that, repeat with other seeds (`config.train.seed`, `config.data.seed`), as
# `benchmarks/demo_against_dense.py` does.
#
# ## Use it
#
# Everything that takes a model takes yours. A checkpoint holds weights, not Python: give the layer
# again after loading.

# %%
mine = models["independent slots"]
ids = tokenizer(["The following example shows"], return_tensors="np")["input_ids"]
print(tokenizer.decode(fm.generate(mine, ids, max_new_tokens=8 if TINY else 32)[0]))

# %% [markdown]
# New *parameters* go a step further: a subclass adds them in `__init__` (see
# [`moe.py`](../finermoe_jax/moe/layer.py), where `separate_routers` and `concat_proj` do), and
# [`upcycle.py`](../finermoe_jax/weights/upcycle.py) says what they start from.
