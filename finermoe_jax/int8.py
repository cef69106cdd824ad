"""A decoder with int8 weights, for generation and evaluation where memory's speed is the limit."""

from flax import nnx

from finermoe_jax.model import Decoder
from finermoe_jax.weights import quantize

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
    is not trained or saved. For one device.
    """

    def convert(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        summed = _SUMMED.get(str(path[-1]))
        if path[-2:] == ("moe", "down"):  # [E, F, W]
            summed = (-2,)
        return variable if summed is None else variable.replace(quantize(variable[...], summed))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(convert, state))
