"""Kinds of parameters: the one table from logical axes to how a parameter is trained and stored.

A parameter's axes are named where it is made (`basic.param`). Code that has to know whether it is
decayed, frozen, quantized or a bank of experts asks here, and never goes by a name, path or rank.
The other table, sharding.RULES, places its axes on a mesh.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from finermoe_jax.errors import InputError

# A parameter's path in its model, e.g. ("runs", 0, 0, "moe", "gate_up").
type Path = tuple[Any, ...]
# The leading axis of what is stacked over the layers of a run; it changes no parameter's kind.
LAYER = "layer"


@dataclasses.dataclass(frozen=True)
class Kind:
    """The way a parameter is trained and stored.

    Attributes:
      decayed: weight decay acts on it.
      backbone: it is not trained if the backbone is frozen.
      summed: the axes, from the end, that its product sums over: int8 weights have one scale for
        each place of the others. Empty: it stays as it is in a quantized model.
      bank: the weights of all experts of a layer, of which a token needs few. It is stored
        row-major, one expert after the other, and spread over the mesh's expert axis.
    """

    decayed: bool = True
    backbone: bool = False
    summed: tuple[int, ...] = ()
    bank: bool = False


# Matrices are [out, in], but for the experts' second, which is [E, in, out].
KINDS: dict[tuple[str, ...], Kind] = {
    ("vocab", "embed"): Kind(summed=(-1,)),
    ("scored_vocab", "width"): Kind(summed=(-1,), backbone=True),
    ("norm",): Kind(decayed=False),
    ("heads", "head_dim", "embed"): Kind(summed=(-1,), backbone=True),
    ("kv_heads", "head_dim", "embed"): Kind(summed=(-1,), backbone=True),
    ("embed", "heads", "head_dim"): Kind(summed=(-2, -1), backbone=True),
    ("heads", "head_dim"): Kind(decayed=False, backbone=True),  # biases
    ("kv_heads", "head_dim"): Kind(decayed=False, backbone=True),
    ("mlp", "embed"): Kind(summed=(-1,), backbone=True),
    ("embed", "mlp"): Kind(summed=(-1,), backbone=True),
    # Small, and the router decides: never in int8.
    ("router", "embed"): Kind(),
    ("gate_in",): Kind(),
    ("expert", "expert_mlp", "expert_in"): Kind(summed=(-1,), bank=True),
    ("expert", "expert_mlp", "expert_out"): Kind(summed=(-2,), bank=True),
    ("shared_mlp", "embed"): Kind(summed=(-1,)),
    ("embed", "shared_mlp"): Kind(summed=(-1,)),
    ("concat", "embed"): Kind(summed=(-1,)),
}


def axes_of(variable: nnx.Variable, path: Path = ()) -> tuple[str, ...]:
    """A parameter's logical axes, "layer" first where it is stacked.

    Raises InputError, which names the path, where it has none.
    """
    axes = variable.get_metadata().get("out_sharding")
    if axes is None:
        raise InputError(f"parameter {'/'.join(map(str, path))} declares no logical axes")
    return tuple(axes)


def of_one_layer(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes without that of the stacked layers."""
    return tuple(axis for axis in axes if axis != LAYER)


def kind_of(axes: Sequence[str]) -> Kind:
    """Returns the kind of a parameter with these axes, stacked or not.

    Raises InputError where KINDS has none.
    """
    own = of_one_layer(axes)
    if own not in KINDS:
        raise InputError(f"logical axes {own} are of no kind in layers/parameters.py")
    return KINDS[own]


def kinds(model: nnx.Module) -> dict[Path, Kind]:
    """Every parameter's path and kind; shapes in place of arrays will do."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {path: kind_of(axes_of(variable, path)) for path, variable in flat}
