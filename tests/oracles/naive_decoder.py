"""Decoders of the Llama family as naively as possible, in float64 NumPy, from their HF directory.

Written from the published descriptions (Llama, arXiv 2302.13971; its long-context frequencies,
arXiv 2407.21783; YaRN, arXiv 2309.00071; Mistral, arXiv 2310.06825, without the window; Qwen3,
arXiv 2505.09388; RoPE, arXiv 2104.09864, in the half-split form of the HF weights). It shares no
code with the package and loops over sequences, tokens, heads and keys. Shapes:

    h width, n query heads, k key/value heads, d width of a head, L tokens, V vocabulary
"""

import math

import numpy as np

from tests.oracles import naive, naive_pool


def _norm(x, scale, eps):
    """Root mean square norm of a vector [m]."""
    return x / math.sqrt(sum(value * value for value in x) / len(x) + eps) * scale


def _rope(config):
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def frequencies(d, config):
    """The angle per position of each of the d / 2 pairs, a list."""
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta", config.get("rope_theta"))
    context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if kind == "yarn":
        # The pairs, as fractions, that turn so many times within the original context.
        first, last = (
            d * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(0, first), min(d - 1, last)
    result = []
    for pair in range(d // 2):
        frequency = 1 / theta ** (2 * pair / d)
        if kind == "linear":
            frequency = frequency / rope["factor"]
        elif kind == "yarn":
            slowed = 0 if pair <= first else 1 if pair >= last else (pair - first) / (last - first)
            frequency = slowed * frequency / rope["factor"] + (1 - slowed) * frequency
        elif kind == "llama3":
            wavelength = 2 * math.pi / frequency
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > context / low:
                frequency = frequency / rope["factor"]
            elif wavelength > context / high:
                smooth = (context / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        result.append(frequency)
    return result


def length_scale(config):
    """The factor on every rotated query and key: YaRN's square root of 1/t."""
    rope = _rope(config)
    if "yarn" not in (rope.get("rope_type"), rope.get("type")):
        return 1.0
    if rope.get("attention_factor"):
        return rope["attention_factor"]
    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    if not over or not under:
        over, under = 1, 0
    return (0.1 * over * math.log(rope["factor"]) + 1) / (
        0.1 * under * math.log(rope["factor"]) + 1
    )


def _rotated(head, position, frequency, scale):
    """A head's vector [d]: pair (i, i + d/2) turned by position * frequency[i], times scale."""
    half = len(head) // 2
    turned = np.zeros(len(head))
    for i in range(half):
        cos, sin = math.cos(position * frequency[i]), math.sin(position * frequency[i])
        turned[i] = head[i] * cos - head[i + half] * sin
        turned[i + half] = head[i] * sin + head[i + half] * cos
    return turned * scale


def _attention(x, w, prefix, positions, config):
    """Causal attention among the tokens x [L, h] -> [L, h]; w holds tensors by HF name."""
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or config["hidden_size"] // n
    frequency, scale = frequencies(d, config), length_scale(config)

    def heads(name, count, rotated):
        made = np.zeros((len(x), count, d))
        for t in range(len(x)):
            flat = w[f"{prefix}{name}_proj.weight"] @ x[t]
            if f"{prefix}{name}_proj.bias" in w:
                flat = flat + w[f"{prefix}{name}_proj.bias"]
            for i in range(count):
                head = flat[i * d : (i + 1) * d]
                if rotated and f"{prefix}{name}_norm.weight" in w:
                    head = _norm(head, w[f"{prefix}{name}_norm.weight"], config["rms_norm_eps"])
                if rotated:
                    head = _rotated(head, positions[t], frequency, scale)
                made[t, i] = head
        return made

    q, keys, values = heads("q", n, True), heads("k", k, True), heads("v", k, False)
    out = np.zeros((len(x), config["hidden_size"]))
    for t in range(len(x)):
        mixed = np.zeros((n, d))
        for i in range(n):
            j = i // (n // k)
            scores = np.array([q[t, i] @ keys[s, j] for s in range(t + 1)]) / math.sqrt(d)
            weights = np.exp(scores - scores.max())
            weights = weights / weights.sum()
            for s in range(t + 1):
                mixed[i] += weights[s] * values[s, j]
        out[t] = w[f"{prefix}o_proj.weight"] @ mixed.reshape(n * d)
    return out


def _experts(w, prefix, settings):
    """A MoE layer's weights under the names of tests/oracles/naive.py."""
    parts = {
        f"experts_{part}": np.stack(
            [w[f"{prefix}experts.{e}.{part}_proj.weight"] for e in range(settings.N)]
        )
        for part in ("gate", "up", "down")
    }
    parts["gate"] = w[f"{prefix}gate.weight"]
    for part in ("gate", "up", "down"):
        parts[f"shared_{part}_proj"] = w[f"{prefix}shared_expert.{part}_proj.weight"]
    parts["shared_expert_gate"] = w[f"{prefix}shared_expert_gate.weight"]
    return parts


def decoder(ids, tensors, config, settings=None, ahead=0, across=1, pooled_as="copies"):
    """Logits [L, V] of one sequence of tokens.

    tensors and config are a HF directory's, by its names; settings (tests/oracles/naive.py)
    makes every layer with a router a FineRMoE with a shared expert. Its router reads the FFN's
    normed input of `ahead` layers before, or of the first layer where there are fewer. With
    across=r, r neighbouring layers use the experts of all of them (naive_pool.py); `ahead` is 0.
    """
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    eps = config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][np.asarray(ids)]
    ffn_inputs = []
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        normed = np.stack([_norm(token, w[f"{layer}input_layernorm.weight"], eps) for token in x])
        x = x + _attention(normed, w, f"{layer}self_attn.", range(len(x)), config)
        scale = w[f"{layer}post_attention_layernorm.weight"]
        normed = np.stack([_norm(token, scale, eps) for token in x])
        ffn_inputs.append(normed)
        if f"{layer}mlp.gate.weight" in w:
            first = number - number % across
            experts, *rest = (
                _experts(w, f"model.layers.{each}.mlp.", settings)
                for each in (number, *range(first, first + across))
            )
            if across > 1:
                rows = experts["gate"].reshape(settings.N, across, -1)
                x = x + naive_pool.layer(normed, rows, rest, experts, settings, pooled_as)[0]
                continue
            read = ffn_inputs[max(number - ahead, 0)]
            x = x + naive.layer(normed[None], experts, settings, read[None])["output"][0]
            continue
        for t in range(len(x)):
            gate = w[f"{layer}mlp.gate_proj.weight"] @ normed[t]
            up = w[f"{layer}mlp.up_proj.weight"] @ normed[t]
            x[t] = x[t] + w[f"{layer}mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return np.stack([head @ _norm(token, w["model.norm.weight"], eps) for token in x])
