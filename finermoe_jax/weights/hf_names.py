"""Table between Hugging Face tensor names and the decoder's parameters, for import and export."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from finermoe_jax.config.model import ModelConfig
from finermoe_jax.weights.lazy import ParamPath


def _same(ours: np.ndarray) -> np.ndarray:
    return ours


def _flat_out(ours: np.ndarray) -> np.ndarray:
    """[heads, head_dim, *in] → [heads * head_dim, *in]."""
    return ours.reshape(ours.shape[0] * ours.shape[1], *ours.shape[2:])


@dataclasses.dataclass(frozen=True)
class Rule:
    """One HF tensor (per layer, and per expert if the name contains {e}).

    `view` maps the JAX array, without its layer and expert axes, to the HF tensor's [out, in]
    shape. It must be a view: import writes into it, export reads from it.
    """

    param: str
    name: str
    view: Callable[[np.ndarray], np.ndarray] = _same

    @property
    def same(self) -> bool:
        """True if both arrays have the same layout: a slice of one is a slice of the other."""
        return self.view is _same


_ATTENTION = (
    Rule("input_norm/scale", "input_layernorm.weight"),
    Rule("post_norm/scale", "post_attention_layernorm.weight"),
    Rule("attention/query", "self_attn.q_proj.weight", _flat_out),
    Rule("attention/key", "self_attn.k_proj.weight", _flat_out),
    Rule("attention/value", "self_attn.v_proj.weight", _flat_out),
    Rule("attention/out", "self_attn.o_proj.weight", lambda w: w.reshape(w.shape[0], -1)),
    Rule("attention/query_bias", "self_attn.q_proj.bias", _flat_out),
    Rule("attention/key_bias", "self_attn.k_proj.bias", _flat_out),
    Rule("attention/value_bias", "self_attn.v_proj.bias", _flat_out),
    Rule("attention/query_norm/scale", "self_attn.q_norm.weight"),
    Rule("attention/key_norm/scale", "self_attn.k_norm.weight"),
)
_DENSE = (
    Rule("mlp/gate", "mlp.gate_proj.weight"),
    Rule("mlp/up", "mlp.up_proj.weight"),
    Rule("mlp/down", "mlp.down_proj.weight"),
)
_MOE = (
    Rule("moe/router", "mlp.gate.weight"),
    # Appears in messages only: published models and exports have no such tensor.
    Rule("moe/group_router", "mlp.group_gate.weight"),
    Rule("moe/gate_up", "mlp.experts.{e}.gate_proj.weight", lambda w: w[: w.shape[0] // 2]),
    Rule("moe/gate_up", "mlp.experts.{e}.up_proj.weight", lambda w: w[w.shape[0] // 2 :]),
    Rule("moe/down", "mlp.experts.{e}.down_proj.weight", lambda w: w.T),
    Rule("moe/shared/gate", "mlp.shared_expert.gate_proj.weight"),
    Rule("moe/shared/up", "mlp.shared_expert.up_proj.weight"),
    Rule("moe/shared/down", "mlp.shared_expert.down_proj.weight"),
    Rule("moe/shared_gate", "mlp.shared_expert_gate.weight", lambda w: w[None]),
    Rule("moe/concat_proj", "mlp.concat_proj.weight"),
    Rule("moe/expert_bias", "mlp.gate.expert_bias"),
    Rule("moe/group_bias", "mlp.gate.group_bias"),
)
# The tensors of parameters that are model state (Kind.state), float32 in every file.
STATE = re.compile(r"\.mlp\.gate\.(expert|group)_bias$")
_TOP = (
    Rule("embed/weight", "model.embed_tokens.weight"),
    Rule("final_norm/scale", "model.norm.weight"),
    Rule("lm_head/weight", "lm_head.weight"),
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The HF tensors that make up one parameter of the decoder.

    `layers` has, for each index of the leading axis, the layers whose tensors it contains (more
    than one in a bank of pools); empty without such an axis. `experts` is the size of the
    second axis, 0 without one. Experts of several layers alternate (moe/routing.py `home`).
    """

    rules: tuple[Rule, ...]
    layers: tuple[tuple[int, ...], ...]
    experts: int

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes that become separate tensors: (), (repeats,) or (repeats, experts)."""
        return tuple(size for size in (len(self.layers), self.experts) if size)

    @property
    def count(self) -> int:
        """Number of tensors."""
        return len(self.rules) * math.prod(self.leading)

    def name(self, rule: Rule, place: tuple[int, ...]) -> str:
        """Returns the HF tensor's name for one rule at one place of the leading axes."""
        if not place:
            return rule.name
        layers = self.layers[place[0]]
        expert, of_layer = divmod(place[1], len(layers)) if self.experts else (0, 0)
        name = f"model.layers.{layers[of_layer]}.{rule.name}"
        return name.replace("{e}", str(expert)) if self.experts else name

    def shapes(self, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields name and shape of every tensor, given the parameter's shape."""
        # Broadcast from one element: nothing of that size is allocated.
        ours = np.broadcast_to(np.empty((), np.int8), shape[len(self.leading) :])
        theirs = [(rule, rule.view(ours).shape) for rule in self.rules]
        for place in np.ndindex(*self.leading):
            yield from ((self.name(rule, place), size) for rule, size in theirs)


def parts(config: ModelConfig, paths: Iterator[ParamPath] | list[ParamPath]) -> dict:
    """Returns the `Parts` of each of the decoder's parameters, by path.

    Raises KeyError if no rule names a parameter.
    """
    top = {tuple(rule.param.split("/")): rule for rule in _TOP}
    rules: dict[tuple[str, ...], tuple[Rule, ...]] = {}
    for rule in (*_ATTENTION, *_DENSE, *_MOE):
        key = tuple(rule.param.split("/"))
        rules[key] = (*rules.get(key, ()), rule)
    table: dict[ParamPath, Parts] = {}
    for path in paths:
        if path in top:
            table[path] = Parts((top[path],), (), 0)
            continue
        _, run, place, *rest = path
        mine = rules[tuple(rest)]
        if config.moe and "{e}" in mine[0].name:
            layers = bank_layers(config, run, place)
            table[path] = Parts(mine, layers, config.moe.pool_size)
        else:
            layers = tuple((layer,) for layer in run_layers(config, run, place))
            table[path] = Parts(mine, layers, 0)
    return table


def run_layers(config: ModelConfig, run: int, place: int) -> tuple[int, ...]:
    """Returns the layer numbers stacked in `runs[run][place]` (ModelConfig.layer_runs)."""
    before = sum(len(pattern) * repeats for pattern, repeats in config.layer_runs[:run])
    pattern, repeats = config.layer_runs[run]
    return tuple(before + repeat * len(pattern) + place for repeat in range(repeats))


def bank_layers(config: ModelConfig, run: int, place: int) -> tuple[tuple[int, ...], ...]:
    """Returns, for each index of the bank in `runs[run][place]`, the layers that share it."""
    pattern, _ = config.layer_runs[run]
    assert config.moe is not None
    moe = [each for each, kind in enumerate(pattern) if kind == "moe"]
    first = moe.index(place)
    group = moe[first : first + config.moe.experts_across]
    return tuple(zip(*(run_layers(config, run, each) for each in group), strict=True))
