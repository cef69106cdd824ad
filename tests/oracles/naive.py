"""The FineRMoE layer (arXiv 2603.13364) written as naively as possible, in float64 NumPy.

It loops over sequences, tokens, slots and experts, and shares no code with the package: it is
the independent reference of the tests, so it is literal rather than fast. Names are the paper's:

    h, H        width of the model, of the dense FFN
    G_I, G_O    granularity of the intermediate and of the output dimension
    R_I, R_O    copies of a slice inside one group, candidate groups of one slot
    T_I         experts active in the chosen group of each slot
    N           G_O * R_O * R_I * G_I experts; H_e = H / G_I and h_e = h / G_O are their widths
    A           G_O * T_I experts active for one token
    B, L        sequences, tokens of a sequence; Hs is the width of the shared expert

Expert e = ((o * R_O + r) * R_I + c) * G_I + i is slice i, copy c, in candidate group r of slot o.
Weights are a dict of arrays as the published checkpoints orient them, [out, in].
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of one layer. The defaults are the behaviour of the published inference model."""

    hidden_size: int
    intermediate_size: int
    G_I: int
    G_O: int
    R_I: int
    R_O: int
    T_I: int
    # Published training code at G_O = 1: top-T_I of all N logits, candidate groups ignored.
    plain_top_k: bool = False
    # Published training code at one active expert: softmax over all N, read at the selected.
    pre_softmax: bool = False
    # Divide the weights by their sum; changes something only together with pre_softmax.
    norm_topk_prob: bool = False
    # "none", "routed": proj(routed) + shared, or "all": proj(routed + shared).
    concat_proj: str = "none"
    shared: bool = True
    # A second router picks the candidate of each slot (ablation of Table 3).
    separate_routers: bool = False

    def __post_init__(self):
        for name in ("G_I", "G_O", "R_I", "R_O", "T_I"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.G_O:
            raise ValueError(f"hidden_size {self.hidden_size} not divisible by G_O {self.G_O}")
        if self.intermediate_size % self.G_I:
            raise ValueError(
                f"intermediate_size {self.intermediate_size} not divisible by G_I {self.G_I}"
            )
        if self.T_I > self.G_I * self.R_I:
            raise ValueError(f"T_I {self.T_I} exceeds G_I * R_I {self.G_I * self.R_I}")
        if self.concat_proj not in ("none", "routed", "all"):
            raise ValueError(f"unknown concat_proj {self.concat_proj!r}")
        if self.plain_top_k and (self.G_O != 1 or self.separate_routers):
            # A plain top-k fills no slots and asks for no candidate.
            raise ValueError("plain_top_k needs G_O = 1 and a single router")

    @property
    def N(self):
        """Number of routed experts."""
        return self.G_O * self.R_O * self.R_I * self.G_I

    @property
    def A(self):
        """Number of experts active for one token."""
        return self.G_O * self.T_I

    @property
    def H_e(self):
        """Intermediate width of one expert."""
        return self.intermediate_size // self.G_I

    @property
    def h_e(self):
        """Output width of one expert."""
        return self.hidden_size // self.G_O


def _sigmoid(z):
    """1 / (1 + exp(-z)), any shape; this form does not overflow."""
    return np.exp(-np.logaddexp(0.0, -z))


def _silu(z):
    """z * sigmoid(z), any shape."""
    return z * _sigmoid(z)


def _softmax(z):
    """Softmax of one vector [n]."""
    e = np.exp(z - np.max(z))
    return e / np.sum(e)


def _first_argmax(values):
    """Index of the largest value; of equal ones the lowest index."""
    best = 0
    for j in range(1, len(values)):
        if values[j] > values[best]:
            best = j
    return best


def _falling(indices, logits):
    """The indices by falling logit; of equal logits the lowest index first."""
    return sorted(indices, key=lambda e: (-logits[e], e))


def _ffn(x, gate, up, down):
    """SwiGLU of one token: x [h], gate and up [n, h], down [m, n] -> [m]."""
    return down @ (_silu(gate @ x) * (up @ x))


def route(logits_1d, settings, group_logits_1d=None, biases=None):
    """Route one token.

    logits_1d [N]; group_logits_1d [G_O * R_O], the second router's, with separate routers only.
    Returns (experts, weights, slot_scale): A expert numbers by falling logit, their weights [A]
    in the same order, and the factor of each slot's output [G_O]. The weights are not multiplied
    by slot_scale, which is 1 with a single router. biases: those of the experts [N] and of the
    groups [G_O * R_O], which only the choice sees.
    """
    s = settings
    logits = np.asarray(logits_1d, np.float64)
    if logits.shape != (s.N,):
        raise ValueError(f"logits have shape {logits.shape}, expected ({s.N},)")
    if (group_logits_1d is not None) != s.separate_routers:
        raise ValueError("group logits go with separate routers, and only with them")

    slot_scale = np.ones(s.G_O)
    expert_bias, group_bias = biases or (np.zeros(s.N), np.zeros(s.G_O * s.R_O))
    compared = logits + np.asarray(expert_bias, np.float64)
    if s.plain_top_k:
        selected = _falling(range(s.N), compared)[: s.A]
    else:
        selected = []
        group_size = s.R_I * s.G_I
        for o in range(s.G_O):
            # Sparse sum layer: the T_I largest logits in every candidate group of the slot.
            marked, scores = [], []
            for r in range(s.R_O):
                start = (o * s.R_O + r) * group_size
                group = range(start, start + group_size)
                marked.append(_falling(group, compared)[: s.T_I])
                # The raw logits of all experts of the group count, marked or not.
                scores.append(sum(logits[e] for e in group))
            # Sparse concatenation layer: one candidate of the slot stays.
            if s.separate_routers:
                scores = np.asarray(group_logits_1d, np.float64)[o * s.R_O : (o + 1) * s.R_O]
            kept = _first_argmax([scores[r] + group_bias[o * s.R_O + r] for r in range(s.R_O)])
            if s.separate_routers:
                # Through the arg-max alone the second router would get no gradient.
                slot_scale[o] = _softmax(scores)[kept]
            selected.extend(marked[kept])

    experts = [int(e) for e in _falling(selected, logits)]
    if s.pre_softmax:
        weights = _softmax(logits)[experts]
    else:
        # Jointly over the selected experts of all slots, so that together they sum to 1.
        weights = _softmax(logits[experts])
    if s.norm_topk_prob:
        weights = weights / np.sum(weights)
    return experts, weights, slot_scale


def layer(x, weights, settings, router_input=None):
    """The layer on x [B, L, h]. The routers read router_input [B, L, h] instead, if given.

    Returns a dict: output [B, L, h], logits [B, L, N], experts [B, L, A] (int, by falling
    logit) and weights [B, L, A] (as `route` gives them, without the slot's scale).
    """
    s = settings
    x = np.asarray(x, np.float64)
    read = x if router_input is None else np.asarray(router_input, np.float64)
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    B, L, h = x.shape
    out = np.zeros((B, L, h))
    all_logits = np.zeros((B, L, s.N))
    all_experts = np.zeros((B, L, s.A), np.int64)
    all_weights = np.zeros((B, L, s.A))

    for b in range(B):
        for t in range(L):
            token = x[b, t]
            logits = w["gate"] @ read[b, t]
            group_logits = w["group_gate"] @ read[b, t] if s.separate_routers else None
            experts, mix, slot_scale = route(logits, s, group_logits)

            routed = np.zeros(h)
            for e, weight in zip(experts, mix, strict=True):
                o = e // (s.R_O * s.R_I * s.G_I)
                y = _ffn(token, w["experts_gate"][e], w["experts_up"][e], w["experts_down"][e])
                # Summed inside its slot only; the slots lie side by side.
                routed[o * s.h_e : (o + 1) * s.h_e] += slot_scale[o] * weight * y

            shared = np.zeros(h)
            if s.shared:
                y = _ffn(token, w["shared_gate_proj"], w["shared_up_proj"], w["shared_down_proj"])
                shared = _sigmoid(w["shared_expert_gate"][0] @ token) * y

            if s.concat_proj == "routed":
                out[b, t] = w["concat_proj"] @ routed + shared
            elif s.concat_proj == "all":
                out[b, t] = w["concat_proj"] @ (routed + shared)
            else:
                out[b, t] = routed + shared
            all_logits[b, t] = logits
            all_experts[b, t] = experts
            all_weights[b, t] = mix

    return {
        "output": out,
        "logits": all_logits,
        "experts": all_experts,
        "weights": all_weights,
    }


def aux_loss(logits, experts, mask, settings):
    """Load-balancing loss of one layer, Eq. 11 with alpha = 1.

    logits [B, L, N], experts [B, L, A], mask [B, L] (true at real tokens) -> float. Padding does
    not count, sequences of padding only leave the mean; without any real token the loss is 0.
    """
    s = settings
    logits = np.asarray(logits, np.float64)
    experts = np.asarray(experts)
    mask = np.asarray(mask, bool)
    losses = []
    for b in range(logits.shape[0]):
        real = [t for t in range(logits.shape[1]) if mask[b, t]]
        if not real:
            continue
        P = np.zeros(s.N)
        count = np.zeros(s.N)
        for t in real:
            P += _softmax(logits[b, t]) / len(real)
            for e in experts[b, t]:
                count[e] += 1
        f = s.N / (s.G_O * s.T_I * len(real)) * count
        losses.append(sum(f[i] * P[i] for i in range(s.N)))
    return float(sum(losses) / len(losses)) if losses else 0.0


def batch_aux_loss(logits, experts, mask, settings):
    """Eq. 11 over the real tokens of the whole batch, as if they were one sequence."""
    real = np.asarray(mask, bool)
    one = np.ones((1, int(real.sum())), bool)
    logits, experts = np.asarray(logits)[real][None], np.asarray(experts)[real][None]
    return aux_loss(logits, experts, one, settings)


def moved_biases(expert_bias, group_bias, tokens, settings, rate):
    """Selection biases after a step in which tokens[e] real tokens chose expert e.

    An expert's bias goes up by the rate if fewer than the mean of its group chose it, down if more
    did; then the mean of the group's biases is taken off. A group's bias does the same inside its
    slot, by the rate times the root of the experts of a group. With plain_top_k all experts are
    one group, and there is no slot.
    """
    s = settings
    expert_bias, tokens = np.array(expert_bias, np.float64), [int(n) for n in tokens]

    def moved(bias, counts, step):
        after = []
        for b, n in zip(bias, counts, strict=True):
            error = sum(counts) - n * len(counts)  # of the load, times the number of rivals
            after.append(b + step * ((error > 0) - (error < 0)))
        return np.array(after) - sum(after) / len(after)

    if s.plain_top_k:
        return moved(expert_bias, tokens, rate), None
    group_bias, size = np.array(group_bias, np.float64), s.R_I * s.G_I
    sums = []
    for g in range(s.G_O * s.R_O):
        group = slice(g * size, (g + 1) * size)
        sums.append(sum(tokens[group]))
        expert_bias[group] = moved(expert_bias[group], tokens[group], rate)
    for o in range(s.G_O):
        slot = slice(o * s.R_O, (o + 1) * s.R_O)
        group_bias[slot] = moved(group_bias[slot], sums[slot], rate * size**0.5)
    return expert_bias, group_bias


def upcycle_ffn(gate, up, down, settings):
    """Experts from a dense FFN, Eq. 9 and 10.

    gate and up [H, h], down [h, H] -> dict of experts_gate and experts_up [N, H_e, h] and
    experts_down [N, h_e, H_e]. The shared expert is the dense FFN itself and not repeated here.
    """
    s = settings
    # The formulas are written for matrices that stand [in, out].
    Wg = np.asarray(gate, np.float64).T
    Wu = np.asarray(up, np.float64).T
    Wd = np.asarray(down, np.float64).T
    h, H = s.hidden_size, s.intermediate_size
    if (Wg.shape, Wu.shape, Wd.shape) != ((h, H), (h, H), (H, h)):
        raise ValueError(f"dense FFN does not have h {h} and H {H}")
    experts_gate = np.zeros((s.N, s.H_e, h))
    experts_up = np.zeros((s.N, s.H_e, h))
    experts_down = np.zeros((s.N, s.h_e, s.H_e))
    for e in range(s.N):
        i = (e % (s.G_I * s.R_I)) % s.G_I
        o = e // (s.R_O * s.G_I * s.R_I)
        inner = slice(i * s.H_e, (i + 1) * s.H_e)
        outer = slice(o * s.h_e, (o + 1) * s.h_e)
        experts_gate[e] = Wg[:, inner].T
        experts_up[e] = Wu[:, inner].T
        experts_down[e] = Wd[inner, outer].T
        if not s.shared:
            experts_down[e] *= s.G_I
    return {
        "experts_gate": experts_gate,
        "experts_up": experts_up,
        "experts_down": experts_down,
    }


def random_weights(rng, settings):
    """All weights that a layer of these settings reads, from a numpy Generator.

    The shared expert gets the dense width, Hs = H. The scale is 1 / sqrt(fan-in): with the small
    standard deviations of training, the outputs would be too small to tell errors apart.
    """
    s = settings
    h, H = s.hidden_size, s.intermediate_size
    shapes = {
        "gate": (s.N, h),
        "experts_gate": (s.N, s.H_e, h),
        "experts_up": (s.N, s.H_e, h),
        "experts_down": (s.N, s.h_e, s.H_e),
    }
    if s.shared:
        shapes["shared_gate_proj"] = (H, h)
        shapes["shared_up_proj"] = (H, h)
        shapes["shared_down_proj"] = (h, H)
        shapes["shared_expert_gate"] = (1, h)
    if s.concat_proj != "none":
        shapes["concat_proj"] = (h, h)
    if s.separate_routers:
        shapes["group_gate"] = (s.G_O * s.R_O, h)
    return {name: rng.standard_normal(shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
