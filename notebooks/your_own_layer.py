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
# A new routing rule is a subclass of a few lines. This notebook defines two, upcycles them from the
# same dense model as FineRMoE, trains all three on the same tokens and compares their losses.
# Change the rules, or write a third.
#
# **Status:** run on a CPU. The library's own layer has been compiled for TPUs, not run there. Your
# layer is plain JAX around the same kernels.

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
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.evaluation.evaluate import held_out_loss
from finermoe_jax.layers.parameters import trained_kinds
from finermoe_jax.moe.routing import route
from finermoe_jax.runtime.files import find
from finermoe_jax.training import style
from finermoe_jax.training.optimizer import optimizer
from finermoe_jax.training.step import rebuild, train_step

plt.rcParams.update(style.SETTINGS)

# %% [markdown]
# ## Two variants
#
# The layer's `route(x)` returns each token's experts and weights, and the order that sorts them by
# output slot. Everything else is unchanged: dispatch, the experts' kernels, the shared expert, the
# load-balancing loss and the gradients.
#
# **Independent slots.** FineRMoE takes one softmax over the active experts of *all* slots, so the
# slots compete for weight. Here, the weight of each slot's expert is the sigmoid of its own logit.


# %%
class IndependentSlots(fm.FineRMoE):
    """Weights that do not compete across slots."""

    def route(self, x):
        routing, slot_order = super().route(x)
        chosen = jnp.take_along_axis(routing.logits, routing.experts, axis=-1)
        return routing._replace(weights=jax.nn.sigmoid(chosen).astype(x.dtype)), slot_order


# %% [markdown]
# **One level.** For each slot, FineRMoE keeps the group with the largest *sum* of logits and takes
# the best expert of that group. Here, the best expert of a slot is taken from any group. Experts
# are numbered by slot, candidate, copy and slice. So this is the library's own rule for one
# candidate group that contains the experts of all candidates as copies.


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
# `with_layer` replaces a model's layer and copies no weights, so all three start from the same
# arrays.

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
# Before training: the share of tokens whose experts differ from FineRMoE's.

# %%
tokenizer = open_tokenizer(base, dense.config.vocab_size)
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
# This is the library's own training step: loss, Eq. 11, clipping and AdamW. All models see the same
# batches.


# %%
def fit(model: fm.Decoder) -> tuple[fm.Decoder, list[float]]:
    """The trained model, and the loss of each step."""
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    tx = optimizer(run.optimizer, run.train.steps, trained_kinds(model, run.train.freeze))
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
# Losses differ more between batches than between layers. The lower picture therefore shows each
# layer's loss minus FineRMoE's on the same batch.

# %%
figure, (top, below) = plt.subplots(2, 1, figsize=(7.5, 6), sharex=True, layout="constrained")
steps, ends = np.arange(1, STEPS + 1), {}
for name, losses in curves.items():
    [line] = top.plot(steps, losses)
    ends[line] = f"{name}\nheld-out: {scores[name]:.3f}"
    below.plot(steps, np.subtract(losses, curves["FineRMoE"]))
top.set_title("training loss, nats per token")
below.set_title("minus FineRMoE's")
below.set_xlabel("step")
below.xaxis.get_major_locator().set_params(integer=True)
style.label_ends(top, ends)
plt.show()

# %% [markdown]
# One seed and a few steps on one megabyte of text show that a layer trains, not which is better. To
# compare layers, repeat with other seeds (`config.train.seed`, `config.data.seed`), as
# `benchmarks/demo_against_dense.py` does.
#
# ## Use it
#
# Every function that takes a model takes yours. A checkpoint stores weights, not Python: call
# `with_layer` again after loading.

# %%
mine = models["independent slots"]
ids = tokenizer(["The following example shows"], return_tensors="np")["input_ids"]
print(tokenizer.decode(fm.generate(mine, ids, max_new_tokens=8 if TINY else 32)[0]))

# %% [markdown]
# To add *parameters*, create them in the subclass's `__init__`, as `separate_routers` and
# `concat_proj` do in [`layer.py`](../finermoe_jax/moe/layer.py), and set their start in
# [`upcycle.py`](../finermoe_jax/weights/upcycle.py).
