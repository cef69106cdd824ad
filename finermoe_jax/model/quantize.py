"""int8 weights, for generation and evaluation limited by memory bandwidth."""

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import axes_of, kind_of
from finermoe_jax.layers.stored import HostLayers, Quantized, quantize
from finermoe_jax.model.decoder import Decoder
from finermoe_jax.model.offload import to_host


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
        if isinstance(value, HostLayers):  # one layer at a time
            return variable.replace(_in_host_memory(value, summed))
        return variable.replace(quantize(value, summed))

    mesh = model.placement.mesh
    if mesh is not None and mesh.size > 1:
        raise InputError(
            f"int8 weights need one device, but the model is on a mesh of {mesh.size}: load it "
            "without a mesh"
        )
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(convert, state))


def _in_host_memory(stack: HostLayers, summed: tuple[int, ...]) -> Quantized:
    device = jax.devices()[0]
    layers = []
    for layer in stack.layers:
        whole = quantize(jax.device_put(layer, SingleDeviceSharding(device)), summed)
        layers.append((to_host(whole.values), to_host(whole.scale)))
        jax.block_until_ready(layers[-1])
    values, scales = (HostLayers(each, stack.computed) for each in zip(*layers, strict=True))
    return Quantized(values, scales)
