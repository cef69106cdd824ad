"""Qwen2.5-1.5B upcycled to FineRMoE and trained with the paper's recipe (Table 5).

    python train.py --config=configs/qwen1p5b.py --config.data.path=TEXT.jsonl --workdir=DIR
    python convert_hf.py --source=Qwen/Qwen2.5-1.5B --target=DIR --config=configs/qwen1p5b.py

128 experts (32, 2, 1, 2), T_I=1; 50 B tokens. Variants are the paper's other architectures, such as
`:ct` (the model stays dense) and `:c32a2`, and `:lean` for one device of 16 GB (Adafactor, bfloat16
weights, 1 x 2048 tokens a step); docs/architectures.md lists all. Parameter counts:
finermoe params --config=configs/qwen1p5b.py
"""

from ml_collections import ConfigDict

from finermoe_jax.config.presets import qwen_config


def get_config(variant: str = "") -> ConfigDict:
    return qwen_config("Qwen2.5-1.5B", variant)
