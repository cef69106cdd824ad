"""Qwen3-0.6B upcycled to FineRMoE and trained with the paper's recipe (Table 5).

    python train.py --config=configs/qwen3_0p6b.py --config.data.path=TEXT.jsonl --workdir=DIR
    python convert_hf.py --source=Qwen/Qwen3-0.6B --target=DIR --config=configs/qwen3_0p6b.py

128 experts (32, 2, 1, 2), T_I=1; 50 B tokens. The paper itself upcycles only Qwen2.5 models.
Variant `:ct` keeps the model dense; `:lean` is for one device of 16 GB. Parameter counts:
finermoe params --config=configs/qwen3_0p6b.py
"""

from ml_collections import ConfigDict

from finermoe_jax.config.presets import qwen_config


def get_config(variant: str = "") -> ConfigDict:
    return qwen_config("Qwen3-0.6B", variant)
