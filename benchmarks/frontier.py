"""The dense frontier: what plain models of all sizes reach, and whether an arm lies beyond it."""
import math
import statistics
from itertools import pairwise

from benchmarks.stats import mean_interval, p_of, quantile, resampled


def frontier(points):
    """[(cost, loss)] -> those that no cheaper or equally cheap one is as good as, by rising cost."""
    kept = []
    for cost, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def loss_at(edge, cost):
    """The loss that the frontier has at a cost, between two of its points on a straight line over the log of
    the cost; that of its last point where more is spent; None where even its first costs more."""
    if not edge or cost < edge[0][0]:
        return None
    for (x0, y0), (x1, y1) in pairwise(edge):
        if cost <= x1:
            return y0 + (y1 - y0) * math.log(cost / x0) / math.log(x1 / x0)
    return edge[-1][1]


def cost_at(edge, loss):
    """What the frontier spends for a loss; None where no dense model is as good."""
    if not edge or loss < edge[-1][1]:
        return None
    for (x0, y0), (x1, y1) in pairwise(edge):
        if y1 <= loss <= y0:
            return x0 * (x1 / x0) ** ((y0 - loss) / (y0 - y1))
    return edge[0][0]


def middle(cost, rounds=None):
    """A cost as one number: itself, or the median of those of all rounds (of the `rounds` named)."""
    if not isinstance(cost, list):
        return cost
    return statistics.median(cost if rounds is None else [cost[number] for number in rounds])


def beyond(costs, losses, arm, rivals):
    """How an arm stands to the frontier of the rivals, seed by seed.

    costs: {arm: cost, or a list of the costs of each timed round}; losses: {arm: {seed: loss}} -> "gain":
    mean_interval of the frontier's loss at the arm's cost less the arm's, None where no rival is so cheap,
    with an interval from seeds and rounds together where the costs are timed, and p; "pays": the whole
    interval is above zero; "cheaper": what the frontier's mean spends for the arm's mean loss over what the
    arm spends (where no rival is as good: the best rival's cost, "at_least" is then True).
    """
    seeds = [seed for seed in losses[arm] if all(seed in losses[rival] for rival in rivals)]
    gains = gains_of(costs, losses, arm, rivals, seeds)
    gain = mean_interval(list(gains.values())) if gains and None not in gains.values() else None
    rounds = min((len(costs[name]) for name in (arm, *rivals) if isinstance(costs[name], list)), default=0)
    if gain and gain["interval"] and rounds:
        error = resampled(lambda drawn: gains_of(costs, losses, arm, rivals, seeds, drawn), seeds, rounds)
        half = quantile(len(seeds) - 1, 0.95) * error
        gain |= {"interval": [gain["mean"] - half, gain["mean"] + half], "rounds": rounds}
    if gain:
        gain["p"] = p_of(gain)
    cost = {name: middle(costs[name]) for name in (arm, *rivals)}
    mean = {name: statistics.fmean(losses[name][seed] for seed in seeds) for name in [arm, *rivals] if seeds}
    edge = frontier((cost[rival], mean[rival]) for rival in rivals if seeds)
    spent = cost_at(edge, mean[arm]) if seeds else None
    best = edge[-1][0] if edge else None
    return {"gain": gain, "pays": bool(gain and gain["interval"] and gain["interval"][0] > 0),
            "cheaper": (spent or best) / cost[arm] if best else None, "at_least": spent is None}


def gains_of(costs, losses, arm, rivals, seeds, rounds=None):
    """{seed: the frontier's loss at the arm's cost less the arm's, None where no rival is so cheap}. With
    rounds the costs are those of these rounds alone, and an arm that is the cheapest in them by chance meets
    the cheapest rival."""
    cost = {name: middle(costs[name], rounds) for name in (arm, *rivals)}
    found = {}
    for seed in seeds:
        edge = frontier((cost[rival], losses[rival][seed]) for rival in rivals)
        there = loss_at(edge, max(cost[arm], edge[0][0]) if rounds and edge else cost[arm])
        found[seed] = None if there is None else there - losses[arm][seed]
    return found
