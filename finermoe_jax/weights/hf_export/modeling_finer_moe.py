"""FineRMoE (arXiv 2603.13364) for transformers, loaded with trust_remote_code=True.

Written by finermoe-jax beside the weights, and independent of that package. A Qwen2-style decoder:
pre-norm residuals, grouped-query attention with rotary positions, and `FineRMoeLayer` in place of
FFNs. It uses only public classes of transformers and none of its model modules.

Serving engines (vLLM, transformers' continuous batching) replace the attention function and the
linear layers. vLLM finds the former by reading this source: see `FineRMoeAttention.forward`.

Letters of shapes: B sequences, T tokens, S keys (cached and new), D hidden_size, N experts, A
num_experts_per_tok.
"""

import functools
import math
import types

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_finer_moe import FineRMoeConfig

if not hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):  # transformers 4.51
    ALL_ATTENTION_FUNCTIONS = types.SimpleNamespace(get_interface=ALL_ATTENTION_FUNCTIONS.get)


class FineRMoeRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis; statistics in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Normalizes x [..., size], in its dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class FineRMoeMLP(nn.Module):
    """down(silu(gate(x)) · up(x)): a dense FFN, the shared expert, or one of the experts."""

    def __init__(self, width, hidden, out):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, out, bias=False)

    def forward(self, x):
        """Maps x [..., width] to [..., out]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FineRMoeAttention(nn.Module):
    """Causal grouped-query attention: several query heads share a key and value head."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = config.head_dim**-0.5, True
        width = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        if config.qk_norm:
            self.q_norm = FineRMoeRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = FineRMoeRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, angles, mask, stored, **kwargs):
        """x [B, T, D]; angles: cos and sin [B or 1, T, head_dim / 2]; mask: see `additive_mask`.

        stored: None, or a cache of transformers and the number of tokens in it. kwargs: further
        arguments of the attention function, such as the paged cache of continuous batching.
        """
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, *angles), rotate(k, *angles), v))
        if stored is not None:
            cache, past = stored
            # Before transformers 5, a static cache needs the positions of the new tokens, and
            # returns all its slots.
            end = past + x.shape[1]
            places = {"cache_position": torch.arange(past, end, device=x.device)}
            k, v = (t[:, :, :end] for t in cache.update(k, v, self.layer_idx, places))
        # vLLM looks for this assignment and this one call in the source. sdpa computes "eager".
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, sdpa_attention_forward
        )
        y, _ = attend(self, q, k, v, mask, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(*x.shape[:2], -1))


def rotary_angles(positions, config):
    """Returns float32 cosines and sines [..., head_dim / 2] of positions, yarn-scaled."""
    dim, rope = config.head_dim, config.rope_parameters
    pairs = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    powers, scale = config.rope_theta ** (pairs / dim), 1.0
    frequencies = 1 / powers
    kind, factor = rope["rope_type"], rope.get("factor")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "llama3":
        # Pairs with few turns within the original context are divided by factor, pairs with many
        # are kept, linear in between.
        turns = original / (2 * math.pi) * frequencies
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    elif kind == "yarn":
        first, last = yarn_range(rope, dim, config.rope_theta, original)
        kept = 1 - ((pairs / 2 - first) / (last - first)).clamp(0, 1)
        frequencies = 1 / (factor * powers) * (1 - kept) + frequencies * kept
        scale = yarn_scale(rope)
    angles = positions[..., None].float() * frequencies
    return angles.cos() * scale, angles.sin() * scale


def yarn_range(rope, dim, theta, original):
    """Returns the pairs below which yarn keeps and above which it divides frequencies by factor.

    They turn beta_fast and beta_slow times within the original context.
    """
    first, last = (
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)  # dim, not dim / 2, as in transformers
    return first, last if last != first else last + 0.001


def yarn_scale(rope):
    """Returns yarn's factor on rotated queries and keys."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    grown = math.log(max(rope["factor"], 1))
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if over and under:
        return (0.1 * over * grown + 1) / (0.1 * under * grown + 1)
    return 0.1 * grown + 1


def rotate(x, cos, sin):
    """Rotates x [B, T, heads, head_dim], in float32; pair i is (x[i], x[i + half])."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def packed_texts(position_ids):
    """Numbers the texts packed into each row, [B or 1, T]; None if every row is one text.

    A text begins where position_ids [B or 1, T] do not increase by one, as in transformers.
    """
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(begins.cumsum(1), (1, 0)) if begins.any() else None


def additive_mask(attention_mask, texts, x, past):
    """Returns the mask to add to the scores of queries x [B, T, D] after `past` cached tokens.

    attention_mask: None; [B, S], 0 at padding; or [B or 1, heads or 1, T, S or more], used alone:
    True where a query sees a key, or floats to add. texts: see `packed_texts`. Returns [B or 1,
    heads or 1, T, S] in x's dtype, or None if plain causal attention is enough.
    """
    tokens = x.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.all():
        attention_mask = None
    if attention_mask is not None and attention_mask.ndim == 4:
        visible = attention_mask[..., : past + tokens]
        if visible.is_floating_point():
            return visible.to(x.dtype)
    elif attention_mask is None and texts is None and (tokens == 1 or not past):
        return None
    else:
        keys = torch.arange(past + tokens, device=x.device)
        visible = (keys <= keys[past:, None])[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask.bool()[:, None, None, :]
        if texts is not None:
            visible = visible & (texts[:, None, :, None] == texts[:, None, None, :])
    # Finite, so that a query without visible keys (padding) gives no NaN.
    hidden = torch.zeros(visible.shape, device=x.device, dtype=x.dtype)
    return hidden.masked_fill(~visible, torch.finfo(x.dtype).min)


def counted_positions(attention_mask, x, past):
    """Positions [B or 1, T] of tokens x [B, T, D]: the real tokens of a row count from 0."""
    real = attention_mask
    if attention_mask is None or attention_mask.ndim == 4:
        real = x.new_ones(1, past + x.shape[1])
    return (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def check_mask(attention_mask, batch, tokens, past):
    """Raises ValueError, naming both shapes, if the mask does not fit the tokens."""
    if attention_mask is None:
        return
    shape, keys = tuple(attention_mask.shape), past + tokens
    if len(shape) == 4:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask of 4 axes is {attention_mask.dtype}; it must be bool (True where "
                "a query sees a key) or float (added to the scores)"
            )
        if shape[0] not in (1, batch) or shape[2] != tokens or shape[3] < keys:
            raise ValueError(
                f"attention_mask {shape} must be ({batch} or 1, heads or 1, {tokens}, {keys} or "
                f"more): {past} cached tokens and {tokens} new ones"
            )
    elif shape != (batch, keys):
        raise ValueError(
            f"attention_mask {shape} must be {(batch, keys)}: {past} cached tokens and {tokens} "
            "new ones"
        )


def pool_groups(values, config):
    """Sorts values [T, P] of a pool's experts into slots, candidate groups and members."""
    members, across = config.R_I * config.G_I, config.experts_across
    if config.pooled_as == "copies":
        return values.view(-1, config.G_O, config.R_O, members * across)
    apart = values.view(-1, config.G_O, config.R_O, members, across).transpose(3, 4)
    return apart.reshape(-1, config.G_O, config.R_O * across, members)


def route(logits, config, expert_bias=None, group_bias=None):
    """Returns the experts of every token and their weights (paper, Algorithm 1).

    logits [T, P], float32, of the P = N · r experts of the r = experts_across layers that share
    them. Expert e = ((slot · R_O + candidate) · R_I + copy) · G_I + slice of layer j of these is
    p = e · r + j; a group is one (slot, candidate), or (slot, candidate, j) if
    pooled_as="candidates". Each slot keeps the candidate with the largest sum of logits and
    that group's best experts; ties go to the lowest index. One softmax spans all slots. Returns
    experts and float32 weights, both [T, A], in slot order.

    expert_bias [P] is added to the logits to choose experts inside a group, group_bias to the
    sums. Neither changes the weights.
    """
    number = pool_groups(torch.arange(logits.shape[-1], device=logits.device)[None], config)
    groups = pool_groups(logits, config)
    sums = groups.sum(-1)
    if group_bias is not None:
        sums = sums + group_bias.view(sums.shape[1:])
        groups = groups + pool_groups(expert_bias[None], config)
    candidate = sums.argmax(-1)[..., None, None]
    # gather, since take_along_dim would fix the number of tokens in a compiled graph.
    group = groups.gather(2, candidate.expand(-1, -1, 1, groups.shape[3])).squeeze(2)
    inside = group.sort(dim=-1, descending=True, stable=True).indices
    inside = inside[..., : config.num_experts_per_tok // config.G_O]
    slot = torch.arange(config.G_O, device=logits.device)[:, None]
    experts = (slot * groups.shape[2] + candidate.squeeze(3)) * groups.shape[3] + inside
    experts = number.flatten()[experts.flatten(1)]
    weights = logits.gather(1, experts).softmax(-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights


class FineRMoeRouter(nn.Module):
    """x W_r in float32, for every model dtype and under autocast.

    In bfloat16 some tokens would choose other experts. No nn.Linear: vLLM replaces these by layers
    that compute in the model's dtype. With config.selection_bias it holds the float32 buffers
    expert_bias and group_bias (`route`), which training here leaves as they are.
    """

    def __init__(self, config):
        super().__init__()
        pool = config.num_experts * config.experts_across
        self.config = config
        self.weight = nn.Parameter(torch.empty(pool, config.hidden_size))
        more = config.experts_across if config.pooled_as == "candidates" else 1
        sizes = (pool, config.G_O * config.R_O * more)
        for name, size in zip(("expert_bias", "group_bias"), sizes, strict=True):
            zeros = torch.zeros(size, dtype=torch.float32) if config.selection_bias else None
            self.register_buffer(name, zeros)

    def forward(self, rows):
        """Maps rows [tokens, D] to logits [tokens, P], float32."""
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.float(), self.weight.float())

    def route(self, logits):
        """Returns the experts and weights of logits [tokens, P], chosen with the biases."""
        return route(logits, self.config, self.expert_bias, self.group_bias)


class FineRMoeLayer(nn.Module):
    """Experts that each compute a slice of the FFN and write a slice (slot) of its output.

    The slots are concatenated, not summed; a gated shared expert is added. No token is dropped.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width, out = config.hidden_size, config.hidden_size // config.G_O
        self.gate = FineRMoeRouter(config)
        # Keys "0", "1", …; no ModuleList: vLLM replaces that by experts as wide as the model.
        self.experts = nn.ModuleDict(
            {
                str(number): FineRMoeMLP(width, config.moe_intermediate_size, out)
                for number in range(config.num_experts)
            }
        )
        self.pool = (self,)  # the layers that share experts; a tuple, so not registered twice
        if config.moe_concat_proj:
            self.concat_proj = nn.Linear(width, width, bias=False)
        if config.shared_expert_intermediate_size:
            self.shared_expert = FineRMoeMLP(width, config.shared_expert_intermediate_size, width)
            self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x, router_input=None):
        """Maps x [B, T, D] to the output [B, T, D] and the router's logits [B·T, N], float32.

        The router reads router_input [B, T, D], by default x.
        """
        rows = x.flatten(0, 1)
        logits = self.gate(rows if router_input is None else router_input.flatten(0, 1))
        experts, weights = self.gate.route(logits)

        # A compiled graph cannot depend on the experts that are chosen.
        whole = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        compute = self.all_experts if whole else self.chosen_experts
        y = compute(rows, experts, weights).view(x.shape)
        if hasattr(self, "concat_proj"):
            y = self.concat_proj(y)
        if hasattr(self, "shared_expert"):
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y, logits

    def expert(self, p):
        """Returns expert p of the pool, numbered as in `route`."""
        across = len(self.pool)
        return self.pool[p % across].experts[str(p // across)]

    def chosen_experts(self, rows, experts, weights):
        """Returns the experts' output [tokens, D] for rows [tokens, D].

        Rows are sorted by expert: experts without tokens are not computed.
        """
        order = experts.flatten().argsort(stable=True)
        size = self.config.num_experts * len(self.pool)
        counts = experts.flatten().bincount(minlength=size).tolist()
        parts = rows[order // experts.shape[1]].split(counts)
        y = torch.cat(
            [self.expert(p)(part).to(rows.device) for p, part in enumerate(parts) if counts[p]]
        )
        y = y[order.argsort()] * weights.flatten()[:, None].to(y.dtype)
        # [tokens, slots, experts of a slot, D / slots]: summed within a slot, slots concatenated.
        return y.view(len(rows), self.config.G_O, -1, y.shape[-1]).sum(2).flatten(1)

    def all_experts(self, rows, experts, weights):
        """Returns the same as `chosen_experts`, in float32 sums; every expert computes all rows."""
        count = self.config.num_experts * len(self.pool)
        weights = weights.to(rows.dtype)
        share = weights.new_zeros(len(rows), count).scatter(1, experts, weights)
        slots = [0.0] * self.config.G_O
        for p in range(count):
            y = self.expert(p)(rows) * share[:, p, None]
            y = torch.where((experts == p).any(1, keepdim=True), y, 0.0)
            slots[p * len(slots) // count] += y.float()
        return torch.cat(slots, dim=1).to(rows.dtype)


def load_balancing_loss(logits, gate, real):
    """Paper Eq. 11 of one layer, weight not applied: logits [B·T, P], real [B, T] 1 at real tokens.

    gate: the layer's router. Per sequence Σ_e f_e · P_e, averaged over sequences: P_e is the mean
    probability of expert e over all P, f_e its share of the routed tokens times P. Padding is
    excluded.
    """
    experts, _ = gate.route(logits)
    batch, active = len(real), experts.shape[1]
    real = real.float()
    length = real.sum(1, keepdim=True).clamp(min=1)
    probabilities = logits.softmax(-1).view(batch, -1, logits.shape[-1])
    mean = (probabilities * real[..., None]).sum(1) / length
    tokens = torch.zeros_like(mean).scatter_add_(
        1, experts.view(batch, -1), real.repeat_interleave(active, dim=1)
    )
    per_sequence = (tokens * logits.shape[-1] / (active * length) * mean).sum(1)
    return per_sequence.sum() / real.any(1).sum().clamp(min=1)


class FineRMoeDecoderLayer(nn.Module):
    """Pre-norm attention and FFN or experts, each added to the residual stream."""

    def __init__(self, config, layer_idx):
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = FineRMoeRMSNorm(width, config.rms_norm_eps)
        self.self_attn = FineRMoeAttention(config, layer_idx)
        self.post_attention_layernorm = FineRMoeRMSNorm(width, config.rms_norm_eps)
        self.mlp = (
            FineRMoeLayer(config)
            if config.has_experts(layer_idx)
            else FineRMoeMLP(width, config.intermediate_size, width)
        )

    def forward(self, x, angles, mask, stored, router_input, **kwargs):
        """Returns x [B, T, D], the router's logits (None in a dense layer) and the FFN's input.

        The router reads router_input [B, T, D]; None: the FFN's input.
        """
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, stored, **kwargs)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, FineRMoeLayer):
            y, logits = self.mlp(normed, router_input)
        else:
            y, logits = self.mlp(normed), None
        return x + y, logits, normed


class FineRMoePreTrainedModel(PreTrainedModel):
    """Settings that transformers needs for both models below."""

    config_class = FineRMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["FineRMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_attention_backend = True
    _supports_cache_class = _supports_static_cache = True  # for transformers 4
    supports_gradient_checkpointing = True
    # Buffers that keep their dtype in models of another one. Transformers 4 would cast them to
    # bfloat16; its _keep_in_fp32_modules takes parameters only.
    _keep_in_fp32_modules_strict = ["expert_bias", "group_bias"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding, FineRMoeRouter)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, FineRMoeRMSNorm):
            nn.init.ones_(module.weight)


def separate_texts(attention_mask, position_ids, cache):
    """Returns `packed_texts` of position_ids if there is no mask, else None."""
    texts = None
    if attention_mask is None and position_ids is not None:
        texts = packed_texts(position_ids)
    if texts is not None and cache is not None:
        raise ValueError(
            "position_ids restart, so the row holds several texts, which a cache cannot "
            "separate: omit past_key_values, or pass an attention_mask"
        )
    return texts


class FineRMoeModel(FineRMoePreTrainedModel):
    """The decoder without lm_head."""

    _auto_class = "AutoModel"
    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            FineRMoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        mixtures = [each.mlp for each in self.layers if isinstance(each.mlp, FineRMoeLayer)]
        for index, mixture in enumerate(mixtures):
            first = index - index % config.experts_across
            mixture.pool = tuple(mixtures[first : first + config.experts_across])
        self.norm = FineRMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()
        if config._attn_implementation == "vllm":  # it adds an lm_head, and would not load that
            self._keys_to_ignore_on_load_unexpected = None

    def get_input_embeddings(self):
        """Returns the embedding, for LoRA and gradient checkpointing."""
        return self.embed_tokens

    def set_input_embeddings(self, value):
        """Replaces the embedding, for a resized vocabulary."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        output_router_logits=None,
        return_dict=None,
        **kwargs,
    ):
        """Arguments as usual in transformers: input_ids [B, T] or inputs_embeds [B, T, D].

        attention_mask [B, S] is 0 at padding, on either side, and covers cached tokens as well;
        position_ids [B, T] follow from it. A mask of four axes (`additive_mask`) is used as it is.
        Without a mask, position_ids that restart mark texts packed into a row: they are kept
        separate and not cached. past_key_values: a dynamic or a static cache. Attention weights are
        never returned; hidden_states are the embeddings, then every layer's output, the last one
        normed. return_dict=False: a tuple of all values that are not None.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        past = int(cache.get_seq_length()) if cache is not None else 0
        # vLLM knows which tokens see each other; continuous batching passes a mask for its cache.
        served = self.config._attn_implementation == "vllm" or "cache" in kwargs
        if not served:
            check_mask(attention_mask, len(x), x.shape[1], past)
        texts = None if served else separate_texts(attention_mask, position_ids, cache)
        recompute = self.gradient_checkpointing and self.training
        if recompute or texts is not None:
            cache = None
        elif cache is None and given(use_cache, self.config.use_cache):
            cache = DynamicCache()
        if position_ids is None:
            position_ids = counted_positions(attention_mask, x, past)
        angles = rotary_angles(position_ids, self.config)
        mask = attention_mask if served else additive_mask(attention_mask, texts, x, past)
        output_hidden_states = given(output_hidden_states, self.config.output_hidden_states)
        output_router_logits = given(output_router_logits, self.config.output_router_logits)
        hidden_states = router_logits = ()
        stored = None if cache is None else (cache, past)
        # FFN inputs of the last layers. No deque: torch.compile keeps all values of an empty one.
        ahead, earlier = self.config.route_ahead, []
        for layer in self.layers:
            hidden_states += (x,) if output_hidden_states else ()
            call = self.call_of(layer, recompute, kwargs)
            x, logits, normed = call(x, angles, mask, stored, earlier[0] if earlier else None)
            earlier = [*earlier, normed][-ahead:] if ahead else []
            router_logits += (logits,) if output_router_logits and logits is not None else ()
        x = self.norm(x)
        out = MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            router_logits=router_logits if output_router_logits else None,
        )
        return dict_or_tuple(out, return_dict, self.config)

    def call_of(self, layer, recompute, kwargs):
        """Returns the layer's call; with `recompute` the backward pass repeats it."""
        call = functools.partial(layer, **kwargs)
        return functools.partial(self._gradient_checkpointing_func, call) if recompute else call


def given(value, default):
    """Returns the value, or the default for None."""
    return default if value is None else value


def dict_or_tuple(out, return_dict, config):
    """Returns the output, or a tuple if return_dict (default: the config's) is False."""
    return out if given(return_dict, config.return_dict) else out.to_tuple()


class FineRMoeForCausalLM(FineRMoePreTrainedModel, GenerationMixin):
    """The decoder with lm_head, which is the embedding if config.tie_word_embeddings is True."""

    # Makes save_pretrained copy this file, in transformers 4 as well.
    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = FineRMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        """Returns the head, which transformers ties or resizes."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """Replaces the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        return_dict=None,
        **kwargs,
    ):
        """Returns logits [B, T, vocab_size]; `FineRMoeModel.forward` describes the other arguments.

        labels: [B, T] token ids, -100 where there is none; loss is the mean cross-entropy of the
        next token. logits_to_keep: number of last positions to score; 0: all; a tensor of indices:
        those positions. With output_router_logits, aux_loss is the sum over layers of
        `load_balancing_loss`, and loss includes router_aux_loss_coef times it.
        """
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None:
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        if out.router_logits:
            aux_loss = self._aux_loss(out, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        out = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
        )
        return dict_or_tuple(out, return_dict, self.config)

    def _aux_loss(self, out, attention_mask):
        shape = out.last_hidden_state.shape[:2]
        real = torch.ones(shape, device=out.last_hidden_state.device)
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -shape[1] :]
        gates = [m for m in self.model.modules() if isinstance(m, FineRMoeRouter)]
        return sum(
            load_balancing_loss(logits, gate, real)
            for logits, gate in zip(out.router_logits, gates, strict=True)
        )
