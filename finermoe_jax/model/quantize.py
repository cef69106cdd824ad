"""int8 weights, for generation and evaluation limited by memory bandwidth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers.parameters import Path, axes_of, kind_of
from finermoe_jax.layers.stored import HostLayers, Quantized, quantize
from finermoe_jax.model.decoder import Decoder, parameter_kinds
from finermoe_jax.model.offload import check_room, host_arguments, to_host


def int8_weights(model: Decoder) -> Decoder:
    """Returns the decoder with every matrix in int8 and one float32 scale per output channel.

    Weight-only: activations, routers, norms, biases and the shared expert's gate keep their dtypes
    (parameters.KINDS). The result can generate and score, not train or be saved.

    Experts in host memory stay there. Raises InputError for a model on a mesh of several devices,
    or if host memory cannot hold the int8 experts beside those of `model`.
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
    stacks = ((v.get_value(), kind_of(axes_of(v, path))) for path, v in nnx.to_flat_state(state))
    sizes = (
        int8_bytes(value.shape, kind.summed)
        for value, kind in stacks
        if isinstance(value, HostLayers)
    )
    check_room(sum(sizes), "the experts' int8 copies")
    return nnx.merge(graphdef, nnx.map_state(convert, state))


def int8_bytes(shape: Sequence[int], summed: tuple[int, ...]) -> int:
    """Returns the bytes of a weight in int8, with its scales."""
    size = math.prod(shape)
    return size + 4 * size // math.prod(shape[axis] for axis in summed)


def check_int8_room(config: ModelConfig, weights: Mapping[Path, Any], experts: str) -> None:
    """Raises InputError if host memory cannot hold the experts and their int8 copies.

    Args:
      config: the model's.
      weights: its parameters, not yet read.
      experts: one of offload.PLACES.
    """
    kinds = parameter_kinds(config)
    stacks = [(weights[path], kinds[path].summed) for path in host_arguments(config, experts)[0]]
    needed = sum(each.nbytes + int8_bytes(each.shape, summed) for each, summed in stacks)
    check_room(needed, "the experts and their int8 copies")


def _in_host_memory(stack: HostLayers, summed: tuple[int, ...]) -> Quantized:
    device = jax.devices()[0]
    layers = []
    for layer in stack.layers:
        whole = quantize(jax.device_put(layer, SingleDeviceSharding(device)), summed)
        layers.append((to_host(whole.values), to_host(whole.scale)))
        jax.block_until_ready(layers[-1])
    values, scales = (HostLayers(each, stack.computed) for each in zip(*layers, strict=True))
    return Quantized(values, scales)
