"""Records a checkpoint of code that knows no pools, for tests/weights/test_pools.py.

    git worktree add before bf41eb6 && cd before
    PYTHONPATH=. python …/tests/recorded/before_pools/make.py …/tests/recorded/before_pools

bf41eb6 is the commit before the one that added pools; selection biases and routing ahead are newer,
too. It saved checkpoint/, a model with random weights, and upcycled.sha256, of the weights of an
upcycled one. Later code must read the first and draw both again, bit for bit.
"""

import dataclasses
import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import finermoe_jax as fm
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.model.decoder import Decoder

MOE = MoEConfig(2, 2, 1, 2, 1)
DENSE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)


def drawn(config):
    """A model with random weights, as training from scratch draws them."""
    return Decoder(config, dtype="bfloat16", param_dtype="bfloat16", rngs=nnx.Rngs(3))


def scratch():
    """A FineRMoE with random weights."""
    return drawn(dataclasses.replace(DENSE, moe=MOE))


def upcycled():
    """A random dense model, upcycled."""
    return fm.upcycle_model(drawn(DENSE), MOE, jax.random.key(4))


def digest(model):
    """The hash of all paths and weights."""
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model)))
    found = hashlib.sha256()
    for path, array in sorted(flat.items(), key=lambda item: str(item[0])):
        found.update(f"{path} {array.dtype} {array.shape}".encode())
        found.update(np.asarray(array).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    fm.save_checkpoint(scratch(), place / "checkpoint")
    (place / "upcycled.sha256").write_text(digest(upcycled()) + "\n")
