# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
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
# # Upcycle Qwen2.5-0.5B to FineRMoE and train it on one TPU
#
# This notebook upcycles a dense model of 0.49 billion parameters to 128 small experts per layer.
# The result has 1.68 billion parameters, of which 0.65 billion are active per token. It then trains
# on a Colab runtime of type *v5e-1 TPU* (16 GB). With `TINY`, a smaller model runs on any CPU in a
# minute.
#
# **Status:** run on a CPU with `TINY`. For one v5e chip the full train step has been compiled, not
# run (`finermoe aot --topology=v5e:1x1 --config=configs/qwen0p5b.py:lean`). The compiler's
# *estimates*: 7.2 of 15.75 GiB, and at least 85 ms per step from the bytes moved, so at most 24
# thousand tokens per second ([docs/scaling.md](../docs/scaling.md)).

# %%
# @title Install, once
# @markdown Leave `SOURCE` empty to install from PyPI. Or give a repository (`git+https://…`) or a
# @markdown copy on Drive (`file:///content/drive/MyDrive/…`; mount Drive first).
# @markdown Colab's JAX is older than this needs, so the runtime restarts. Then run this cell again.
import importlib.util
import subprocess
import sys

SOURCE = ""  # @param {type:"string"}
DEVICE = "tpu"  # @param ["cpu", "tpu", "cuda"]
if importlib.util.find_spec("finermoe_jax") is None:
    package = "finermoe-jax" if DEVICE == "cpu" else f"finermoe-jax[{DEVICE}]"
    wanted = f"{package} @ {SOURCE}" if SOURCE else package
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wanted], check=True)
    print("Installed. The runtime restarts; run this cell again.")
    from IPython import get_ipython

    get_ipython().kernel.do_shutdown(restart=True)

# %%
# @title What to run
import os
from pathlib import Path

TINY = False  # @param {type:"boolean"}
STEPS = 200  # @param {type:"integer"}
TEXT = "demo/pydoc_small.txt"  # @param {type:"string"}
WORKDIR = "runs/qwen0p5b"  # @param {type:"string"}

TINY |= os.environ.get("FINERMOE_TINY") == "1"
if TINY:
    STEPS, WORKDIR = 12, "runs/tiny"

import jax
from IPython.display import Image, display

import finermoe_jax as fm

print(jax.__version__, jax.devices())

# %% [markdown]
# `TEXT` is a `.txt`, `.jsonl` or `.parquet` file, also on Google Drive
# ([docs/data.md](../docs/data.md)). The default is one megabyte of Python documentation from the
# package.
#
# ## The run
#
# A preset sets every field, and you can change any of them. `lean` is the recipe for one device of
# 16 GB:
#
# - Weights are bfloat16, rounded at random after each update.
# - Adafactor keeps no first moment, and stores second moments as sums over rows and columns.
# - Each layer is recomputed in the backward pass.
# - The loss is computed in chunks, so that not all logits over the 152 thousand words of the
#   vocabulary exist at once.
# - One step is one sequence of 2048 tokens.
#
# With float32 weights and AdamW, the weights and optimizer state alone would take 20 GB.

# %%
config = fm.preset("configs/demo.py" if TINY else "configs/qwen0p5b.py:lean")
config.data.path = TEXT
config.prompts = ("The following example shows",)
config.prompt_tokens = 8 if TINY else 48
config.data.eval_windows = 8
config.train.update(
    steps=STEPS, eval_every=STEPS // 2, checkpoint_every=STEPS, keep_checkpoints=1, load_every=2
)
if not TINY:  # a short run, so a higher rate than the paper's for 50 billion tokens
    config.optimizer.update(learning_rate=5e-5, final_learning_rate=5e-6, warmup_fraction=0.05)

run = fm.run_config(config.to_dict())
print(run.moe)

# %% [markdown]
# The parameter counts: in all, and active per token.

# %%
from finermoe_jax.analysis.params import run_model, true_counts

model_config = run_model(run)
counts = true_counts(model_config)
print(f"{counts.total / 1e6:,.1f} M parameters, {counts.active / 1e6:,.1f} M active per token")
print(
    f"{run.moe.num_experts} experts a layer, {run.moe.num_active} active; each maps "
    f"{model_config.hidden_size} → {model_config.expert_intermediate_size} → "
    f"{model_config.expert_output_size} values"
)

# %% [markdown]
# ## Upcycle and train
#
# One call reads the dense weights (1 GB from the Hub, unless `TINY`), cuts every FFN in two
# dimensions, evaluates the dense and the upcycled model on held-out text, and trains. The interrupt
# button (■) saves and stops. Running the cell again resumes.

# %%
from finermoe_jax.training.run import train

workdir = Path(WORKDIR)
train(run, workdir)

# %% [markdown]
# The dashed line is the dense model on the same held-out text. The upcycled model starts above it,
# because its router is untrained, and comes down.

# %%
display(Image(workdir / "loss.png", width=700))

# %% [markdown]
# The load of the experts: one row per layer, one cell per expert. White is an even load, orange
# more, purple less ([docs/monitoring.md](../docs/monitoring.md)).

# %%
display(Image(workdir / "load.png", width=1000))

# %% [markdown]
# ## Use it

# %%
from finermoe_jax.weights.source import open_model, read_model

source = open_model(workdir)
model = read_model(source, workdir)
tokenizer = fm.load_tokenizer(workdir)
prompt = "The following example shows"
print(prompt + fm.complete(model, tokenizer, prompt, max_new_tokens=8 if TINY else 48))

# %% [markdown]
# Export to Hugging Face's format, with the authors' tensor names
# ([docs/huggingface.md](../docs/huggingface.md)). On Colab, copy the export to Drive: the runtime's
# disk is temporary.

# %%
exported = workdir / "exported"
if not exported.exists():
    fm.save_hf(model, exported, source.files)
sorted(path.name for path in exported.iterdir())

# %% [markdown]
# Next: [look_inside.ipynb](look_inside.ipynb) shows which experts process which word, in this
# checkpoint or another. [your_own_layer.ipynb](your_own_layer.ipynb) changes the layer.
