"""A decoder with int8 weights, for generation and evaluation where memory's speed is the limit."""

from flax import nnx

from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import axes_of, kind_of
from finermoe_jax.layers.stored import Quantized, quantize
from finermoe_jax.model.decoder import Decoder


def int8_weights(model: Decoder) -> Decoder:
    """The decoder with every matrix as int8 and a float32 scale for each output channel.

    Activations stay as they are (weight-only quantization), and so do routers, norms, biases and
    the shared expert's gate (parameters.KINDS). The result generates and scores; it is not trained
    or saved.

    Raises InputError: a model on a mesh of several devices.
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
            f"int8 weights are for one device, and the model is on a mesh of {mesh.size}: load it "
            "without a mesh"
        )
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(convert, state))
