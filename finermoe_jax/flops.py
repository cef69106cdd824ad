"""Model FLOPs of a training step, and what a device could do: model FLOPs utilisation (MFU).

MFU = model FLOPs per second / (devices * peak of one device)

Model FLOPs are those that the model's arithmetic needs, whatever the program does: recomputation,
padding, masked scores and the optimizer do not count, nor does elementwise work. Forward, per token
(letters: finermoe_jax/config.py; C is the mean number of keys a causal query sees, (T + 1) / 2):

    attention projections   2 D H (N + 2 K) + 2 N H D      each layer
    scores and their sum    4 N H C                        each layer
    dense FFN               6 D F_dense                    each dense layer
    router                  2 D E                          each MoE layer, as all below
    second router           2 D R O                        separate_routers only
    shared expert           6 D F_shared + 2 D             its gate is the last term
    routed experts          A (4 D F + 2 F W)              the A active ones
    concat_proj             2 D D                          ablation only
    lm_head                 2 D V                          once, tied or not

Forward and backward take three times that; what a frozen backbone holds has no weight gradient and
takes it twice. Tokens are those that are no padding. Packed documents see fewer keys than C: for
them the scores, and MFU with them, are counted a little too high.
"""

from finermoe_jax.config import ModelConfig
from finermoe_jax.topology import CHIPS

# FLOP/s of one JAX device in dense bfloat16 products, by the beginning of its device_kind: the
# vendors' published peaks, as topology.CHIPS. The longest beginning that fits counts.
PEAKS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "TPU v7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": CHIPS["h100"].flops,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": CHIPS["h100"].flops,
    "NVIDIA B200": 2250e12,
}
# Other chips whose names begin alike.
_OTHERS = ("TPU v4 lite", "TPU v4i")


def peak_flops(kind: str) -> float | None:
    """A device kind's peak in bfloat16, FLOP/s; None where it is not known, as of any CPU."""
    found = [name for name in (*PEAKS, *_OTHERS) if kind.startswith(name)]
    return PEAKS.get(max(found, key=len)) if found else None


def forward_flops(model: ModelConfig, sequence_length: int) -> dict[str, float]:
    """FLOPs per token of the forward pass, all layers together, by what they are spent on."""
    d, head = model.hidden_size, model.attention_head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    moe_layers = model.layer_kinds.count("moe")
    dense_layers = model.num_hidden_layers - moe_layers
    layer = {
        "attention projections": 2 * d * head * (2 * heads + 2 * kv_heads),
        "scores": 4 * heads * head * (sequence_length + 1) / 2,
    }
    flops = {name: float(model.num_hidden_layers * value) for name, value in layer.items()}
    flops["dense FFN"] = 6.0 * dense_layers * d * model.intermediate_size
    if moe := model.moe if moe_layers else None:
        f, w = model.expert_intermediate_size, model.expert_output_size
        shared = model.shared_expert_size
        part = {
            "router": 2 * d * (moe.num_experts + moe.separate_routers * moe.num_groups),
            "shared expert": 6 * d * shared + 2 * d * (shared > 0),
            "routed experts": moe.num_active * (4 * d * f + 2 * f * w),
            "concat_proj": 2 * d * d * (moe.concat_proj != "none"),
        }
        flops |= {name: float(moe_layers * value) for name, value in part.items()}
    flops["lm_head"] = 2.0 * d * model.vocab_size
    return flops


def training_flops(
    model: ModelConfig, sequence_length: int, freeze_backbone: bool = False
) -> float:
    """FLOPs per token of the forward and the backward pass."""
    forward = forward_flops(model, sequence_length)
    still = ("attention projections", "dense FFN", "lm_head") if freeze_backbone else ()
    return 3.0 * sum(forward.values()) - sum(forward[name] for name in still)
