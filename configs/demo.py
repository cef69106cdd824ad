"""The main job, small: a dense Qwen2 becomes a FineRMoE, trains on, and talks.

    python train.py --config=configs/demo.py          # upcycled with (8, 2, 1, 2), T_I=1
    python train.py --config=configs/demo.py:ct       # the dense base trained on the same tokens

Any other of the paper's architectures is a variant, too (docs/architectures.md): `:c32a2`.

No download, no accelerator. The base, its tokenizer and its text lie in finermoe_jax/demo; the
granularities are the published ones scaled down. README.md says what to expect.
"""

from ml_collections import ConfigDict

from finermoe_jax import default_config
from finermoe_jax.config.presets import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    config.init_from = "demo/model"
    config.moe.update(intermediate_granularity=8, output_granularity=2)
    config.prompts = ("The following example shows", "import ", "Return the")
    config.data.update(
        path="demo/pydoc_small.txt",
        sequence_length=256,
        global_batch_size=16,
        eval_windows=64,
        seed=1,
    )
    config.optimizer.update(learning_rate=1e-3, final_learning_rate=1e-4, warmup_fraction=0.05)
    config.train.update(
        steps=150,
        compute_dtype="float32",
        remat="dots",
        eval_every=50,
        checkpoint_every=50,
    )
    apply_variant(config, variant)
    return config
