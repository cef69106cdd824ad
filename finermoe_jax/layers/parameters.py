"""The one table from logical axes to a parameter's kind: how it is trained and stored.

`basic.param` names a parameter's axes. Code that asks whether a parameter is decayed, trained,
quantized or an expert bank uses this table, never its name, path or rank. sharding.RULES is the
table for the mesh.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from finermoe_jax.errors import InputError

# A parameter's path in its model, e.g. ("runs", 0, 0, "moe", "gate_up").
type Path = tuple[Any, ...]
# Leading axis of parameters stacked over a run's layers; it does not affect the kind.
LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class Kind:
    """The way a parameter is trained and stored.

    Attributes:
      part: its name in train.freeze, one of config.run.PARTS.
      decayed: weight decay applies.
      summed: axes, from the end, that its product sums over; int8 weights have one scale per index
        of the other axes. Empty: never quantized.
      outputs: output axes, from the end, of a matrix that Muon orthogonalizes. The matrix maps
        `summed` to them; other axes count matrices. Empty: Muon leaves the parameter to AdamW.
      joined: matrices that are stored as one, each after the other along the output axis.
      bank: the weights of all experts of a layer. Stored row-major, one expert after the other, and
        sharded over the mesh's expert axis.
      state: set by a rule outside of the gradient (moe/balance.py). Never in gradients or in the
        optimizer's state; float32 whatever the dtype of the weights.
    """

    part: str
    decayed: bool = True
    summed: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    joined: int = 1
    bank: bool = False
    state: bool = False

    def stored_as(self, dtype: DTypeLike) -> jnp.dtype:
        """Returns the dtype of such a parameter in a model with weights of `dtype`."""
        return jnp.dtype(jnp.float32 if self.state else dtype)


# Matrices are [out, in], except the experts' down, [E, in, out].
KINDS: dict[tuple[str, ...], Kind] = {
    ("vocab", "embed"): Kind("embedding", summed=(-1,)),
    ("scored_vocab", "width"): Kind("lm_head", summed=(-1,)),
    ("norm",): Kind("norms", decayed=False),
    ("heads", "head_dim", "embed"): Kind("attention", summed=(-1,), outputs=(-3, -2)),
    ("kv_heads", "head_dim", "embed"): Kind("attention", summed=(-1,), outputs=(-3, -2)),
    ("embed", "heads", "head_dim"): Kind("attention", summed=(-2, -1), outputs=(-3,)),
    ("heads", "head_dim"): Kind("attention", decayed=False),  # biases
    ("kv_heads", "head_dim"): Kind("attention", decayed=False),
    ("mlp", "embed"): Kind("dense_ffn", summed=(-1,), outputs=(-2,)),
    ("embed", "mlp"): Kind("dense_ffn", summed=(-1,), outputs=(-2,)),
    # Never int8: they are small, and router errors change the choice of experts.
    ("router", "embed"): Kind("router"),
    ("depth",): Kind("router", decayed=False),  # a bias of router and experts
    ("router",): Kind("router", decayed=False, state=True),  # selection biases
    ("gate_in",): Kind("shared_gate"),
    # Gate and up.
    ("expert", "expert_mlp", "expert_in"): Kind(
        "experts", summed=(-1,), outputs=(-2,), joined=2, bank=True
    ),
    ("expert", "expert_mlp", "expert_out"): Kind("experts", summed=(-2,), outputs=(-1,), bank=True),
    ("shared_mlp", "embed"): Kind("shared_expert", summed=(-1,), outputs=(-2,)),
    ("embed", "shared_mlp"): Kind("shared_expert", summed=(-1,), outputs=(-2,)),
    ("concat", "embed"): Kind("concat_proj", summed=(-1,), outputs=(-2,)),
}


def axes_of(variable: nnx.Variable, path: Path = ()) -> tuple[str, ...]:
    """Returns a parameter's logical axes, "layer" first if it is stacked.

    Raises InputError, naming the path, if it has none.
    """
    axes = variable.get_metadata().get("out_sharding")
    if axes is None:
        raise InputError(f"parameter {'/'.join(map(str, path))} declares no logical axes")
    return tuple(axes)


def of_one_layer(axes: Sequence[str]) -> tuple[str, ...]:
    """Removes the axis of stacked layers."""
    return tuple(axis for axis in axes if axis != LAYER)


def kind_of(axes: Sequence[str]) -> Kind:
    """Returns the kind of a parameter with these axes, stacked or not.

    Raises InputError if KINDS has none.
    """
    own = of_one_layer(axes)
    if own not in KINDS:
        raise InputError(f"logical axes {own} have no kind: add one to layers/parameters.py")
    return KINDS[own]


def kinds(model: nnx.Module) -> dict[Path, Kind]:
    """Returns every parameter's path and kind; works on shapes as well as arrays."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: kind_of(axes_of(variable, path)) for path, variable in flat}


def trained_kinds(model: nnx.Module, freeze: Sequence[str] = ()) -> dict[Path, Kind]:
    """Returns the path and kind of every parameter that has gradients and optimizer state.

    Model state (Kind.state) has none, nor have the parts that `freeze` names (train.freeze).

    Raises InputError if nothing is left.
    """
    found = kinds(model)
    left = {
        path: kind for path, kind in found.items() if not kind.state and kind.part not in freeze
    }
    if found and not left:
        parts = sorted({kind.part for kind in found.values()})
        raise InputError(
            f"train.freeze={','.join(freeze)} leaves nothing of this model to train: its parts are "
            f"{', '.join(parts)}. Remove one of them from train.freeze"
        )
    return left
