"""A decoder with int8 weights, for generation and evaluation where memory's speed is the limit."""

from flax import nnx

from finermoe_jax.errors import InputError
from finermoe_jax.layers.stored import Quantized, quantize
from finermoe_jax.model.decoder import Decoder

# Last axes of each matrix that its product sums over. Router, norms, biases and the shared
# expert's gate are left as they are: they are small, and the router decides.
_SUMMED = {
    "query": (-1,), "key": (-1,), "value": (-1,), "out": (-2, -1),
    "gate": (-1,), "up": (-1,), "down": (-1,), "concat_proj": (-1,), "weight": (-1,),
    "gate_up": (-1,),
}  # fmt: skip


def int8_weights(model: Decoder) -> Decoder:
    """The decoder with every matrix as int8 and a float32 scale for each output channel.

    Activations stay as they are (weight-only quantization). The result generates and scores; it
    is not trained or saved.

    Raises InputError: a model on a mesh of several devices.
    """

    def convert(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        summed = _SUMMED.get(str(path[-1]))
        if path[-2:] == ("moe", "down"):  # [E, F, W]
            summed = (-2,)
        value = variable.get_value()
        if summed is None or isinstance(value, Quantized):
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
