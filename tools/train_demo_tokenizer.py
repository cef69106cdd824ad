"""Trains the demo's byte-level BPE tokenizer on the demo text.

python tools/train_demo_tokenizer.py        # writes finermoe_jax/demo/model/tokenizer*.json
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DEMO = Path(__file__).resolve().parent.parent / "finermoe_jax" / "demo"
VOCABULARY = 2048
END = "<|endoftext|>"


def main() -> None:
    """Trains the tokenizer and writes its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(DEMO / "pydoc_small.txt")], trainer)
    tokenizer.save(str(DEMO / "model" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    path = DEMO / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
