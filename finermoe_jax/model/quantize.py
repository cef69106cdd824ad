"""int8 weights, for generation and evaluation limited by memory bandwidth."""

from flax import nnx

from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import axes_of, kind_of
from finermoe_jax.layers.stored import Quantized, quantize
from finermoe_jax.model.decoder import Decoder


def int8_weights(model: Decoder) -> Decoder:
    """Returns the decoder with every matrix in int8 and one float32 scale per output channel.

    Weight-only: activations, routers, norms, biases and the shared expert's gate keep their dtypes
    (parameters.KINDS). The result can generate and score, not train or be saved.

    Raises InputError for a model on a mesh of several devices.
    """

    def convert(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        summed = kind_of(axes_of(variable, path)).summed
        value = variable.get_value()
        if not summed or isinstance(value, Quantized):
            return variable
        return variable.replace(quantize(value, summed))

    mesh = model.placement.mesh
    if mesh is not None and mesh.size > 1:
        raise InputError(
            f"int8 weights need one device, but the model is on a mesh of {mesh.size}: load it "
            "without a mesh"
        )
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(convert, state))
