"""config.json of a FineRMoE model, for transformers (trust_remote_code=True).

Written by finermoe-jax beside the weights. The keys are those of the published models; symbols of
the paper (arXiv 2603.13364): h = hidden_size, H = intermediate_size.
"""

from transformers import PretrainedConfig

# Defaults of missing keys. None: derived from the other keys.
_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_norm": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "G_I": 32,
    "G_O": 2,
    "R_I": 1,
    "R_O": 2,
    "num_experts": None,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": None,
    "shared_expert_intermediate_size": 0,
    "experts_across": 1,
    "pooled_as": "copies",
    "route_ahead": 0,
    "moe_concat_proj": False,
    "norm_topk_prob": False,
    "selection_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# Required keys by rope_type. original_max_position_embeddings defaults to max_position_embeddings.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# Linear layers that tensor parallelism splits along their outputs and inputs; the others are whole
# on every device.
_SPLIT = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
_TP_PLAN = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.o_proj": "rowwise",
    **{
        f"layers.*.mlp.{ffn}{name}": split
        for ffn in ("", "experts.*.", "shared_expert.")
        for name, split in _SPLIT.items()
    },
}


class FineRMoeConfig(PretrainedConfig):
    """A Qwen2-style decoder with experts that are fine-grained in two dimensions.

    The experts:
      G_I: slices along the intermediate width; moe_intermediate_size = H / G_I.
      G_O: slots along the output width, which are concatenated; an expert writes h / G_O columns.
      R_I: copies of every slice inside a group of G_I * R_I experts.
      R_O: candidate groups for each slot; the router picks one.
      num_experts: G_O * R_O * R_I * G_I.
      experts_across: number of neighbouring MoE layers whose experts form a pool; each of these
        layers routes to the whole pool (ReXMoE, arXiv 2510.17483). No released model sets it.
      pooled_as: "copies": the other layers' experts are further members of each group;
        "candidates": further candidate groups of each slot.
      route_ahead: k; the router of layer l reads the FFN input of layer l - k, or of layer 0 if
        there is none (after Pre-gated MoE, arXiv 2308.12066). No released model sets it.
      num_experts_per_tok: active experts of a token, the same number in each of the G_O slots.
      shared_expert_intermediate_size: width of the expert that every token uses; 0: none.
      moe_concat_proj: a projection [h, h] after the concatenation.
      selection_bias: the routers hold biases that change which experts are chosen.
      norm_topk_prob: divides the weights of a token's experts by their sum once more.
      decoder_sparse_step, mlp_only_layers: layer i has experts if i is not in mlp_only_layers and
        i + 1 is a multiple of decoder_sparse_step; the others have a dense FFN of width H.
      output_router_logits: returns the routers' logits and the load-balancing loss (paper Eq. 11),
        and adds the latter, times router_aux_loss_coef, to the loss.

    The attention: qkv_bias (as in Qwen2) and qk_norm (Qwen3's norm of every query and key head).
    The base of the rotary positions may be in rope_theta and their scaling in rope_scaling, as in
    the published files, or both in rope_parameters, as transformers 5 writes them. rope_type is
    "default", "linear", "llama3" or "yarn".

    With tie_word_embeddings, lm_head is the embedding.

    Raises ValueError for numbers that contradict each other and for features that are not
    supported.
    """

    model_type = "finer_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = _TP_PLAN

    def __init__(self, rope_theta=10000.0, rope_scaling=None, rope_parameters=None, **values):
        rope = rope_scaling or rope_parameters or {}
        rope = {"rope_type": rope.get("type", "default"), "rope_theta": rope_theta} | rope
        if rope["rope_type"] not in _ROPE:
            raise ValueError(f"rope_type={rope['rope_type']!r} is not one of {', '.join(_ROPE)}")
        if lacking := [key for key in _ROPE[rope["rope_type"]] if not rope.get(key)]:
            raise ValueError(f"rope_type={rope['rope_type']!r} lacks {', '.join(lacking)}")
        for key, default, computed in (
            ("hidden_act", "silu", ("silu", "swish")),  # synonyms
            ("use_sliding_window", False, (False,)),
        ):
            if (value := values.get(key, default)) not in computed:
                raise ValueError(f"{key}={value!r} is not supported; set it to {computed[0]!r}")
        self.rope_parameters, self.rope_theta = rope, rope["rope_theta"]
        values = _DEFAULTS | values
        self.use_cache = values.pop("use_cache")
        # transformers reads this value while setting the others.
        self.max_position_embeddings = values.pop("max_position_embeddings")
        super().__init__(**values)  # every value becomes an attribute

        if self.num_experts_per_tok > self.G_O * self.R_I * self.G_I:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}, but the {self.G_O} groups of a "
                f"token hold {self.G_O * self.R_I * self.G_I} experts"
            )
        for whole, part in (
            ("hidden_size", "G_O"),
            ("intermediate_size", "G_I"),
            ("num_experts_per_tok", "G_O"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} must be a multiple of "
                    f"{part}={getattr(self, part)}"
                )
        for key, derived in (
            ("num_experts", self.G_O * self.R_O * self.R_I * self.G_I),
            ("moe_intermediate_size", self.intermediate_size // self.G_I),
        ):
            if getattr(self, key) not in (None, derived):
                raise ValueError(f"{key}={getattr(self, key)}, but the other keys make {derived}")
            setattr(self, key, derived)
        layers = sum(map(self.has_experts, range(self.num_hidden_layers)))
        if self.experts_across < 1 or layers % self.experts_across:
            raise ValueError(
                f"experts_across={self.experts_across} must divide the {layers} layers with experts"
            )
        if self.route_ahead and not 0 < self.route_ahead < layers:
            raise ValueError(
                f"route_ahead={self.route_ahead} must be at least 0 and less than the {layers} "
                "layers with experts"
            )
        if self.pooled_as not in ("copies", "candidates"):
            raise ValueError(f"pooled_as={self.pooled_as!r} must be 'copies' or 'candidates'")
        self.mlp_only_layers = list(self.mlp_only_layers or ())
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    def has_experts(self, layer):
        """True if layer number `layer`, from 0, has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
