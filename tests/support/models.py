"""Directories of small models, and what models hold and compute."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models

# The authors' published model in its variants: directories in GOLDEN.
CASES = [
    "a_base",
    "b_ri2_ti2",
    "c_go4_concatproj",
    "d_noshare",
    "e_conv_split",
    "f_conv_copy",
]


def config_of(source, **changes):
    """A source's config.json with changes, of which None takes a key away."""
    values = json.loads((source / "config.json").read_text()) | changes
    return {k: v for k, v in values.items() if v is not None or k not in changes}


def write_tokenizer(folder, words, **special):
    """One token per word, w0 to w{words - 1}; special tokens among them."""
    vocabulary = {f"w{i}": i for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def weights(model):
    flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model)))
    return {path: np.asarray(leaf) for path, leaf in flat.items()}


@functools.partial(jax.jit, static_argnames="graphdef")
def compiled(graphdef, state, *inputs):
    return nnx.merge(graphdef, state)(*inputs)


def run(model, *inputs):
    """model(*inputs), compiled once per architecture and shape."""
    return compiled(*nnx.split(model), *(None if x is None else jnp.asarray(x) for x in inputs))
