"""Model FLOPs of a training step, for model FLOPs utilisation (MFU).

MFU = model FLOPs per second / (devices * peak of one device)

Model FLOPs exclude recomputation, padding, masked scores, the optimizer and elementwise work.
Forward, per token (letters: config/model.py; C = (T + 1) / 2 is the mean number of keys that a
causal query sees):

    attention projections   2 D H (N + 2 K) + 2 N H D      each layer
    scores and their sum    4 N H C                        each layer
    dense FFN               6 D F_dense                    each dense layer
    router                  2 D E                          each MoE layer
    second router           2 D R O                        separate_routers only
    shared expert           6 D F_shared                   each MoE layer, as the next three
    shared gate             2 D
    routed experts          A (4 D F + 2 F W)              A active experts
    concat_proj             2 D D                          ablation only
    lm_head                 2 D V                          once, tied or not

A training step costs three times that. Parts in train.freeze cost twice that, as they need no
weight gradient.
Padding tokens do not count. Queries in packed documents see fewer keys than C, so their scores, and
with them MFU, are slightly overestimated.
"""

from collections.abc import Sequence

from finermoe_jax.config.model import ModelConfig

# Part in train.freeze → its products in `forward_flops`.
_PRODUCTS = {
    "attention": "attention projections",
    "dense_ffn": "dense FFN",
    "router": "router",
    "experts": "routed experts",
    "shared_expert": "shared expert",
    "shared_gate": "shared gate",
    "concat_proj": "concat_proj",
}


def forward_flops(model: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Returns FLOPs per token of the forward pass, by part, summed over all layers."""
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
        second = moe.output_granularity * moe.pool_candidates
        part = {
            "router": 2 * d * (moe.pool_size + moe.separate_routers * second),
            "shared expert": 6 * d * shared,
            "shared gate": 2 * d * (shared > 0),
            "routed experts": moe.num_active * (4 * d * f + 2 * f * w),
            "concat_proj": 2 * d * d * (moe.concat_proj != "none"),
        }
        flops |= {name: float(moe_layers * value) for name, value in part.items()}
    flops["lm_head"] = 2.0 * d * model.vocab_size
    return flops


def newton_schulz_flops(model: ModelConfig, freeze: Sequence[str] = ()) -> float:
    """Returns FLOPs of Muon's orthogonalization per optimizer step, for all matrices once.

    Five iterations, each of 4 m^2 n + 2 m^3 for a matrix [m, n] with m <= n. They do not count as
    model FLOPs.
    """
    d, head = model.hidden_size, model.attention_head_dim
    heads, kv_heads = model.num_attention_heads * head, model.num_key_value_heads * head
    layers, moe_layers = model.num_hidden_layers, model.layer_kinds.count("moe")
    # Part in train.freeze → (number of matrices, their sides).
    matrices: dict[str, list[tuple[int, int, int]]] = {
        "attention": [(2 * layers, heads, d), (2 * layers, kv_heads, d)],
        "dense_ffn": [(3 * (layers - moe_layers), model.intermediate_size, d)],
    }
    if moe := model.moe if moe_layers else None:
        f, w = model.expert_intermediate_size, model.expert_output_size
        count = moe_layers * moe.num_experts
        matrices["experts"] = [(2 * count, f, d), (count, f, w)]
        matrices["shared_expert"] = [(3 * moe_layers, model.shared_expert_size, d)]
        matrices["concat_proj"] = [(moe_layers * (moe.concat_proj != "none"), d, d)]
    return 5.0 * sum(
        count * (4 * min(sides) ** 2 * max(sides) + 2 * min(sides) ** 3)
        for part, found in matrices.items()
        if part not in freeze
        for count, *sides in found
    )


def training_flops(model: ModelConfig, sequence_length: int, freeze: Sequence[str] = ()) -> float:
    """Returns FLOPs per token of the forward and the backward pass; `freeze`: train.freeze."""
    forward = forward_flops(model, sequence_length)
    head = "embedding" if model.tie_word_embeddings else "lm_head"
    products = {**_PRODUCTS, head: "lm_head"}
    frozen = sum(forward.get(products[part], 0.0) for part in freeze if part in products)
    return 3.0 * sum(forward.values()) - frozen
