"""A layer that routes to the experts of r neighbouring layers (ReXMoE), in float64 NumPy loops.

Written from arXiv 2510.17483 (Eq. 2 to 6) and naive.py's reading of FineRMoE. It shares no code
with the package, and keeps the experts of each layer apart: experts[j][e] is expert e of the
group's layer j. In the flat numbers that the package reports, this is e * r + j.
"""

import numpy as np

from tests.oracles import naive


def route(logits, s, pooled_as, allowed=None, second=None):
    """Routes one token: [((e, j), weight)], by falling logit. logits and allowed are [N, r].

    "copies": a candidate group has the r * G_I * R_I experts of all layers; "candidates": each slot
    has r * R_O groups, of one layer each. second: the second router's logits of all groups, in
    order; the weights of a slot are multiplied by the chosen group's probability.
    """
    N, r = logits.shape
    allowed = np.ones((N, r), bool) if allowed is None else allowed
    size = s.G_I * s.R_I
    if s.plain_top_k:
        slots = [[[(e, j) for e in range(N) for j in range(r)]]]
    else:
        slots = []
        for o in range(s.G_O):
            groups = []
            for candidate in range(s.R_O):
                first = (o * s.R_O + candidate) * size
                if pooled_as == "copies":
                    groups.append([(e, j) for e in range(first, first + size) for j in range(r)])
                else:
                    groups += [[(e, j) for e in range(first, first + size)] for j in range(r)]
            slots.append(groups)
    chosen, scale = [], {}
    for o, groups in enumerate(slots):
        best, kept, scores = -np.inf, None, []
        for number, group in enumerate(groups):
            members = [place for place in group if allowed[place]]
            score = sum(logits[place] for place in members)
            if second is not None:
                score = second[o * len(groups) + number]
            scores.append(score if members else -np.inf)
            if scores[-1] > best:
                best, kept = scores[-1], members
        active = s.A if s.plain_top_k else s.T_I
        taken = sorted(kept, key=lambda place: (-logits[place], place))[:active]
        share = 1 / np.exp(np.array(scores) - best).sum()
        scale |= dict.fromkeys(taken, 1.0 if second is None else share)
        chosen += taken
    chosen = sorted(chosen, key=lambda place: (-logits[place], place))
    values = np.array([logits[place] for place in chosen])
    if s.pre_softmax:
        every = np.array([logits[place] for place in np.ndindex(N, r) if allowed[place]])
        weights = np.exp(values - every.max()) / np.exp(every - every.max()).sum()
    else:
        weights = np.exp(values - values.max())
        weights /= weights.sum()
    weights = weights * [scale[place] for place in chosen]
    return list(zip(chosen, weights, strict=True))


def layer(x, router, experts, own, s, pooled_as, allowed=None, depth=None):
    """The layer on tokens x [T, h].

    router [N, r, h]; experts: for each layer j a dict of experts_gate, experts_up, experts_down;
    own: the layer's dict with its shared expert; depth [h] or None: added before router and routed
    experts. Returns outputs [T, h], flat expert numbers [T, A] and weights [T, A].
    """
    outputs, numbers, mixes = [], [], []
    for token in np.asarray(x, np.float64):
        seen = token if depth is None else token + depth
        routed = np.zeros(s.hidden_size)
        second = None
        if s.separate_routers:  # with "copies" a group is that of all layers
            rows = own["group_gate"] if pooled_as == "candidates" else own["group_gate"][:, :1]
            second = (rows @ seen).ravel()
        chosen = route(router @ seen, s, pooled_as, allowed, second)
        for (e, j), weight in chosen:
            slot = e // (s.R_O * s.R_I * s.G_I)
            gate, up, down = (experts[j][f"experts_{part}"][e] for part in ("gate", "up", "down"))
            hidden = gate @ seen
            y = down @ (hidden / (1 + np.exp(-hidden)) * (up @ seen))
            routed[slot * s.h_e : (slot + 1) * s.h_e] += weight * y
        if s.shared:
            hidden = own["shared_gate_proj"] @ token
            y = own["shared_down_proj"] @ (
                hidden / (1 + np.exp(-hidden)) * (own["shared_up_proj"] @ token)
            )
            routed += y / (1 + np.exp(-(own["shared_expert_gate"][0] @ token)))
        outputs.append(routed)
        numbers.append([e * router.shape[1] + j for (e, j), _ in chosen])
        mixes.append([weight for _, weight in chosen])
    return np.array(outputs), np.array(numbers), np.array(mixes)


def random_pool(rng, s, r):
    """Each layer's weights (naive.random_weights), with rows of r layers for the routers.

    gate is [N, r, h], and a second router's group_gate [G_O * R_O, r, h].
    """
    layers = [naive.random_weights(rng, s) for _ in range(r)]
    for weights in layers:
        weights["gate"] = rng.standard_normal((s.N, r, s.hidden_size)) / np.sqrt(s.hidden_size)
        if s.separate_routers:
            rows = rng.standard_normal((s.G_O * s.R_O, r, s.hidden_size))
            weights["group_gate"] = rows / np.sqrt(s.hidden_size)
    return layers
