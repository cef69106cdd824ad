"""Small demo: upcycles a tiny dense Qwen2 to FineRMoE, trains it and generates text.

    python train.py --config=configs/demo.py          # upcycled with (8, 2, 1, 2), T_I=1
    python train.py --config=configs/demo.py:ct       # the dense base trained on the same tokens

The paper's other architectures are variants too, such as `:c32a2` (docs/architectures.md).

Needs no download and no accelerator: base model, tokenizer and text are in finermoe_jax/demo. The
granularities are the published ones scaled down. README.md shows the expected result.
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
