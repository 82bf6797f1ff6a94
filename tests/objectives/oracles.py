"""Every objective once more, from its formula, in mpmath with 100 digits: plain exp and log, no tricks.

Nothing here is shared with megadpo/objectives. An oracle takes the batch twice: `now`, which the gradient moves, and
`still`, where the formula says that no gradient goes. It returns the loss: the mean, not the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from mpmath import exp, log, mp, mpf

from megadpo.objectives import Mix, Sequences

mp.dps = 100
ONE, HALF = mpf(1), mpf(1) / 2


@dataclass(frozen=True)
class Batch:
    """Lists over groups, of lists over responses; those of tokens are one level deeper."""

    p: list[list[Any]]
    q: list[list[Any]]
    n: list[list[int]]
    good: list[bool] | None = None
    score: list[list[Any]] | None = None
    drift: Any = None
    pt: list[list[list[Any]]] | None = None
    qt: list[list[list[Any]]] | None = None
    body: list[list[list[bool]]] | None = None
    collision: list[list[list[Any]]] | None = None
    kl: list[list[list[Any]]] | None = None
    rival: list[list[list[Any]]] | None = None


def batch_of(sequences: Sequences) -> Batch:
    """The numbers of Sequences, exactly."""
    offsets = sequences.offsets_G1.tolist()
    lengths = sequences.tokens_S.tolist()
    starts = [sum(lengths[:k]) for k in range(len(lengths))]

    def per_response(values: torch.Tensor | None) -> Any:
        if values is None:
            return None
        exact = [mpf(v) for v in values.tolist()]
        return [exact[a:b] for a, b in pairwise(offsets)]

    def per_token(values: torch.Tensor | None) -> Any:
        if values is None:
            return None
        exact = [v if isinstance(v, bool) else mpf(v) for v in values.tolist()]
        cut = [exact[s : s + n] for s, n in zip(starts, lengths, strict=True)]
        return [cut[a:b] for a, b in pairwise(offsets)]

    labels = sequences.labels_S
    return Batch(
        p=per_response(sequences.policy_S),
        q=per_response(sequences.reference_S),
        n=[lengths[a:b] for a, b in pairwise(offsets)],
        good=None if labels is None else labels.tolist(),
        score=per_response(sequences.scores_S),
        drift=None if sequences.mismatched_kl is None else mpf(float(sequences.mismatched_kl)),
        pt=per_token(sequences.policy_N),
        qt=per_token(sequences.reference_N),
        body=per_token(sequences.body_N),
        collision=per_token(sequences.collision_N),
        kl=per_token(sequences.kl_N),
        rival=per_token(sequences.rival_N),
    )


MOVED = {"policy_S": "p", "policy_N": "pt", "kl_N": "kl", "rival_N": "rival"}


def value_and_gradient(objective: Any, sequences: Sequences) -> tuple[Any, dict[str, list[Any]]]:
    """The oracle's loss, and by central differences (step 1e-40, 100 digits) its gradient along all that moves."""
    oracle = ORACLES[type(objective).__name__]
    still = batch_of(sequences)
    gradient: dict[str, list[Any]] = {}
    step = mpf(10) ** -40
    for name, short in MOVED.items():
        values = getattr(still, short)
        if values is None:
            continue
        deep = name.endswith("_N")
        places = [(g, k) for g, row in enumerate(values) for k in range(len(row))]
        if deep:
            places = [(g, k, t) for g, k in places for t in range(len(values[g][k]))]
        gradient[name] = []
        for place in places:
            ends = []
            for sign in (1, -1):
                changed = [[list(cell) if deep else cell for cell in row] for row in values]
                cell = changed[place[0]]
                for index in place[1:-1]:
                    cell = cell[index]
                cell[place[-1]] += sign * step
                ends.append(oracle(objective, replace(still, **{short: changed}), still))
            gradient[name].append((ends[0] - ends[1]) / (2 * step))
    return oracle(objective, still, still), gradient


def s(x: Any) -> Any:
    return 1 / (1 + exp(-x))


def mean(values: list[Any]) -> Any:
    return sum(values, mpf(0)) / len(values)


def clip(x: Any, least: Any) -> Any:
    return x if x > least else least


# -- pairs ---------------------------------------------------------------------------------------------------------

Pair = Callable[[Any, Any, int], Any]


def over_pairs(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A mean over groups of formula(objective, D_w, D_l, |y_w|, |y_l|)."""

    def oracle(o: Any, now: Batch, still: Batch) -> Any:
        return mean(
            [
                formula(o, p[0] - q[0], p[1] - q[1], mpf(n[0]), mpf(n[1]))
                for p, q, n in zip(now.p, now.q, now.n, strict=True)
            ]
        )

    return oracle


def two_label(m: Any, flip: Any) -> Any:
    return -(1 - mpf(flip)) * log(s(m)) - mpf(flip) * log(s(-m))


def dpo(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return two_label(mpf(o.beta) * (w - l), o.label_smoothing)


def robust(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    m, flip = mpf(o.beta) * (w - l), mpf(o.label_smoothing)
    return ((1 - flip) * -log(s(m)) - flip * -log(s(-m))) / (1 - flip - flip)


def r_dpo(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return log(1 + exp(-(mpf(o.beta) * w + mpf(o.alpha) * nw - mpf(o.beta) * l - mpf(o.alpha) * nl)))


def dpo_norm(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return log(1 + exp(-mpf(o.beta) * (w / nw - l / nl)))


def dpop(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    penalty = -w if w < 0 else mpf(0)
    return log(1 + exp(-mpf(o.beta) * (w - l - mpf(o.alpha) * penalty)))


def spin(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return log(1 + exp(-mpf(o.beta) * (w - l)))


def dpo_nll(o: Any, now: Batch, still: Batch) -> Any:
    preference = over_pairs(spin)(o, now, still)
    chosen = [(p[0], n[0]) for p, n in zip(now.p, now.n, strict=True)]
    if o.normalise == "response":
        nll = mean([-p / n for p, n in chosen])
    elif o.normalise == "tokens":
        nll = -sum(p for p, _ in chosen) / sum(n for _, n in chosen)
    else:
        nll = mean([-p for p, _ in chosen])
    return preference + mpf(o.alpha) * nll


def ipo(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    if o.log_ratio == "average":
        w, l = w / nw, l / nl
    return (w - l - 1 / (2 * mpf(o.beta))) ** 2


def hinge(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return clip(1 - mpf(o.beta) * (w - l), 0)


def sppo(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return (w - HALF / mpf(o.beta)) ** 2 + (l + HALF / mpf(o.beta)) ** 2


def exo(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    m, flip = mpf(o.beta) * (w - l), mpf(o.label_smoothing)
    return s(m) * (log(s(m)) - log(1 - flip)) + s(-m) * (log(s(-m)) - log(flip))


def nca(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    rw, rl = mpf(o.beta) * w, mpf(o.beta) * l
    return -log(s(rw)) - HALF * log(s(-rw)) - HALF * log(s(-rl))


def apo_zero(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return 1 - s(mpf(o.beta) * w) + s(mpf(o.beta) * l)


def apo_down(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    return s(mpf(o.beta) * w) + 1 - s(mpf(o.beta) * (w - l))


def discopop(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    m = mpf(o.beta) * (w - l)
    share = s(m / mpf(o.tau))
    return (1 - share) * log(1 + exp(-m)) + share * exp(-m)


def f_dpo(o: Any, w: Any, l: Any, nw: Any, nl: Any) -> Any:
    def slope(ratio: Any) -> Any:
        u = exp(ratio)
        if o.divergence == "reverse_kl":
            return log(u) + 1
        if o.divergence == "forward_kl":
            return -1 / u
        if o.divergence == "js":
            return log(2 * u / (1 + u))
        return (1 - exp(-mpf(o.alpha) * ratio)) / mpf(o.alpha)

    m = mpf(o.beta) * slope(w) - mpf(o.beta) * slope(l)
    if abs(m) > 10**6:  # log(1 + exp(-m)) to 400 000 digits; m itself may have 4343 before its point
        return -m if m < 0 else mpf(0)
    return -log(s(m))


def odpo(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for p, q, score in zip(now.p, now.q, now.score, strict=True):
        gap = score[0] - score[1]
        m = mpf(o.beta) * ((p[0] - q[0]) - (p[1] - q[1]))
        if o.alpha == 0:
            losses.append(-log(s(m)))
        elif o.offset == "linear":
            losses.append(-log(s(m - mpf(o.alpha) * gap)))
        else:  # s(m - a log gap) = 1 / (1 + gap^a e^-m), which is 1 for a gap of 0
            losses.append(log(1 + gap ** mpf(o.alpha) * exp(-m)))
    return mean(losses)


def rpo_reward(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for p, q, score in zip(now.p, now.q, now.score, strict=True):
        m = mpf(o.beta) * ((p[0] - q[0]) - (p[1] - q[1]))
        t = mpf(o.eta) * (score[0] - score[1])
        if o.distance == "squared":
            losses.append((m - t) ** 2)
            continue
        a, b = (t, m) if o.distance == "backward_kl" else (m, t)
        losses.append(s(a) * log(s(a) / s(b)) + s(-a) * log(s(-a) / s(-b)))
    return mean(losses)


# -- without a reference -------------------------------------------------------------------------------------------


def slic(o: Any, now: Batch, still: Batch) -> Any:
    return mean([clip(mpf(o.delta) - p[0] + p[1], 0) - mpf(o.alpha) * p[0] for p in now.p])


def simpo(o: Any, now: Batch, still: Batch) -> Any:
    return mean(
        [
            two_label(mpf(o.beta) * (p[0] / n[0] - p[1] / n[1]) - mpf(o.gamma), o.label_smoothing)
            for p, n in zip(now.p, now.n, strict=True)
        ]
    )


def orpo(o: Any, now: Batch, still: Batch) -> Any:
    def odds(p: Any, n: int) -> Any:
        chance = exp(p / n)
        return chance / (1 - chance)

    ratio = mean(
        [log(1 + odds(p[1], n[1]) / odds(p[0], n[0])) for p, n in zip(now.p, now.n, strict=True)]
    )  # -log s(log(a / b)) = log(1 + b / a)
    if o.normalise == "response":
        nll = mean([-p[0] / n[0] for p, n in zip(now.p, now.n, strict=True)])
    else:
        nll = -sum(p[0] for p in now.p) / sum(n[0] for n in now.n)
    return nll + mpf(o.beta) * ratio


def cpo(o: Any, now: Batch, still: Batch) -> Any:
    preference = mean([two_label(mpf(o.beta) * (p[0] - p[1]), o.label_smoothing) for p in now.p])
    over = sum(n[0] for n in now.n) if o.normalise == "tokens" else len(now.n)
    return preference + mpf(o.alpha) * -sum(p[0] for p in now.p) / over


def click(o: Any, now: Batch, still: Batch) -> Any:
    contrast = mean([clip(mpf(o.gamma) + p[1] - p[0], 0) for p in now.p])
    return -sum(p[0] for p in now.p) / sum(n[0] for n in now.n) + mpf(o.alpha) * contrast


# -- tokens --------------------------------------------------------------------------------------------------------


def ld_dpo(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for pt, qt in zip(now.pt, now.qt, strict=True):
        common = min(len(pt[0]), len(pt[1]))

        def reward(k: int, pt: Any = pt, qt: Any = qt, common: int = common) -> Any:
            head = sum(pt[k][:common]) - sum(qt[k][:common])
            return head + mpf(o.alpha) * (sum(pt[k][common:]) - sum(qt[k][common:]))

        losses.append(-log(s(mpf(o.beta) * (reward(0) - reward(1)))))
    return mean(losses)


def llama3(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for g, (pt, qt) in enumerate(zip(now.pt, now.qt, strict=True)):
        inner = [
            sum((a - b for a, b, inside in zip(pt[k], qt[k], now.body[g][k], strict=True) if inside), mpf(0))
            for k in (0, 1)
        ]
        losses.append(-log(s(mpf(o.beta) * (inner[0] - inner[1]))) - mpf(o.alpha) * now.p[g][0] / now.n[g][0])
    return mean(losses)


def tdpo1(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for p, q, kl in zip(now.p, now.q, now.kl, strict=True):
        margin = (p[0] - q[0]) - (p[1] - q[1])
        losses.append(-log(s(mpf(o.beta) * margin - mpf(o.beta) * (sum(kl[1]) - sum(kl[0])))))
    return mean(losses)


def tdpo2(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for p, q, kl, frozen in zip(now.p, now.q, now.kl, still.kl, strict=True):
        margin = (p[0] - q[0]) - (p[1] - q[1])
        losses.append(-log(s(mpf(o.beta) * (margin - mpf(o.alpha) * (sum(kl[1]) - sum(frozen[0]))))))
    return mean(losses)


def wpo(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for p, q, pt, collision in zip(now.p, now.q, still.pt, still.collision, strict=True):
        weight = ONE
        for k in (0, 1):
            weight *= exp(mean([a - c for a, c in zip(pt[k], collision[k], strict=True)]))
        if o.clamp and weight > 1:
            weight = ONE
        losses.append(weight * -log(s(mpf(o.beta) * ((p[0] - q[0]) - (p[1] - q[1])))))
    return mean(losses)


def cringe(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for g, (pt, rival) in enumerate(zip(now.pt, now.rival, strict=True)):
        margin = still.p[g][0] - still.p[g][1]
        gate = s((mpf(o.bias) - margin) / mpf(o.temperature))
        unlike = sum(-log(exp(k) / (exp(k) + exp(t))) for t, k in zip(pt[1], rival[1], strict=True))
        losses.append(gate * (-now.p[g][0] + mpf(o.alpha) * unlike))
    return mean(losses)


# -- across the batch ----------------------------------------------------------------------------------------------


def aot(o: Any, now: Batch, still: Batch) -> Any:
    u = sorted(p[0] - p[1] for p in now.p)
    v = sorted(q[0] - q[1] for q in now.q)
    return mean([two_label(mpf(o.beta) * (a - b), o.label_smoothing) for a, b in zip(u, v, strict=True)])


def aot_unpaired(o: Any, now: Batch, still: Batch) -> Any:
    w = sorted(p[0] - q[0] for p, q in zip(now.p, now.q, strict=True))
    l = sorted(p[1] - q[1] for p, q in zip(now.p, now.q, strict=True))
    return mean([two_label(mpf(o.beta) * (a - b), o.label_smoothing) for a, b in zip(w, l, strict=True)])


def bco(o: Any, now: Batch, still: Batch) -> Any:
    chosen = mean([mpf(o.beta) * (p[0] - q[0]) for p, q in zip(still.p, still.q, strict=True)])
    rejected = mean([mpf(o.beta) * (p[1] - q[1]) for p, q in zip(still.p, still.q, strict=True)])
    shift = (chosen + rejected) / 2
    return mean(
        [
            -log(s(mpf(o.beta) * (p[0] - q[0]) - shift)) - log(s(-(mpf(o.beta) * (p[1] - q[1]) - shift)))
            for p, q in zip(now.p, now.q, strict=True)
        ]
    )


def beta_dpo(o: Any, now: Batch, still: Batch) -> Any:
    margins = [(p[0] - q[0]) - (p[1] - q[1]) for p, q in zip(still.p, still.q, strict=True)]
    beta = mpf(o.beta) * (1 + mpf(o.alpha) * (mean([mpf(o.beta) * m for m in margins]) - mpf(o.margin)))
    beta = clip(beta, mpf("0.001"))
    return mean([log(1 + exp(-beta * ((p[0] - q[0]) - (p[1] - q[1])))) for p, q in zip(now.p, now.q, strict=True)])


# -- single responses ----------------------------------------------------------------------------------------------


def kto(o: Any, now: Batch, still: Batch) -> Any:
    z = clip(now.drift, 0)
    losses = []
    for p, q, good in zip(now.p, now.q, now.good, strict=True):
        ratio = p[0] - q[0]
        if good:
            losses.append(mpf(o.desirable_weight) * (1 - s(mpf(o.beta) * (ratio - z))))
        else:
            losses.append(mpf(o.undesirable_weight) * (1 - s(mpf(o.beta) * (z - ratio))))
    return mean(losses)


def bco_unpaired(o: Any, now: Batch, still: Batch) -> Any:
    def rewards(batch: Batch) -> list[Any]:
        return [mpf(o.beta) * (p[0] - q[0]) for p, q in zip(batch.p, batch.q, strict=True)]

    kinds = [[r for r, good in zip(rewards(still), still.good, strict=True) if good is kind] for kind in (True, False)]
    shift = mean([mean(kind) for kind in kinds if kind])
    return mean(
        [-log(s(r - shift)) if good else -log(s(shift - r)) for r, good in zip(rewards(now), now.good, strict=True)]
    )


def apo_zero_unpaired(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for p, q, good in zip(now.p, now.q, now.good, strict=True):
        r = mpf(o.beta) * (p[0] - q[0])
        losses.append(mpf(o.desirable_weight) * (1 - s(r)) if good else mpf(o.undesirable_weight) * s(r))
    return mean(losses)


# -- lists ---------------------------------------------------------------------------------------------------------


def order(rewards: list[Any]) -> Any:
    """Minus the log-probability that they are drawn in this order, each time one of those left."""
    chance = ONE
    for k in range(len(rewards)):
        chance *= exp(rewards[k]) / sum(exp(r) for r in rewards[k:])
    return -log(chance)


def plackett_luce(o: Any, now: Batch, still: Batch) -> Any:
    return mean(
        [order([mpf(o.beta) * (a - b) for a, b in zip(p, q, strict=True)]) for p, q in zip(now.p, now.q, strict=True)]
    )


def rrhf(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for g, (p, n) in enumerate(zip(now.p, now.n, strict=True)):
        score = [a / mpf(b) ** mpf(o.length_penalty) for a, b in zip(p, n, strict=True)]
        judged = range(len(p)) if now.score is None else now.score[g]
        places = [(i, j) for i in range(len(p)) for j in range(i + 1, len(p)) if judged[i] != judged[j]]
        pairs = [clip(score[j] - score[i], 0) for i, j in places]
        losses.append(sum(pairs, mpf(0)) - mpf(o.alpha) * p[0])
    return mean(losses)


# -- reward models, supervised, mixes ------------------------------------------------------------------------------


def reward(o: Any, now: Batch, still: Batch) -> Any:
    losses = []
    for g, r in enumerate(now.p):
        asked = now.score[g][0] - now.score[g][1] if o.margin else mpf(0)
        losses.append(log(1 + exp(-(r[0] - r[1] - asked))) + mpf(o.centering) * (r[0] + r[1]) ** 2)
    return mean(losses)


def reward_list(o: Any, now: Batch, still: Batch) -> Any:
    return mean([order(r) + mpf(o.centering) * sum(r) ** 2 for r in now.p])


def sft(o: Any, now: Batch, still: Batch) -> Any:
    return -sum(p[0] for p in now.p) / sum(n[0] for n in now.n)


def mix(o: Mix, now: Batch, still: Batch) -> Any:
    weights = o.weights or (1.0,) * len(o.parts)
    return sum(
        mpf(weight) * ORACLES[type(part).__name__](part, now, still)
        for part, weight in zip(o.parts, weights, strict=True)
    )


ORACLES: dict[str, Callable[..., Any]] = {
    "DPO": over_pairs(dpo),
    "RobustDPO": over_pairs(robust),
    "RDPO": over_pairs(r_dpo),
    "NormDPO": over_pairs(dpo_norm),
    "DPOP": over_pairs(dpop),
    "SPIN": over_pairs(spin),
    "DPOWithNLL": dpo_nll,
    "IPO": over_pairs(ipo),
    "RSOHinge": over_pairs(hinge),
    "SPPOHard": over_pairs(sppo),
    "EXO": over_pairs(exo),
    "NCA": over_pairs(nca),
    "APOZero": over_pairs(apo_zero),
    "APODown": over_pairs(apo_down),
    "DiscoPOP": over_pairs(discopop),
    "FDPO": over_pairs(f_dpo),
    "ODPO": odpo,
    "RewardRPO": rpo_reward,
    "SLiC": slic,
    "SimPO": simpo,
    "ORPO": orpo,
    "CPO": cpo,
    "CLICK": click,
    "LDDPO": ld_dpo,
    "Llama3DPO": llama3,
    "TDPO1": tdpo1,
    "TDPO2": tdpo2,
    "WPO": wpo,
    "Cringe": cringe,
    "AOT": aot,
    "AOTUnpaired": aot_unpaired,
    "BCO": bco,
    "BetaDPO": beta_dpo,
    "KTO": kto,
    "BCOUnpaired": bco_unpaired,
    "APOZeroUnpaired": apo_zero_unpaired,
    "PlackettLuceDPO": plackett_luce,
    "RRHF": rrhf,
    "BradleyTerry": reward,
    "PlackettLuceReward": reward_list,
    "SFT": sft,
    "Mix": mix,
}
