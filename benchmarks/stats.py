"""Means over seeds with their uncertainty, by Student's t, and the t distribution itself."""
import math
import random
import statistics
from functools import cache


def mean_interval(values, level=0.95):
    """-> {"mean", "interval": [low, high] that holds it with this confidence, None for one value, "n"}."""
    mean, n = statistics.fmean(values), len(values)
    half = quantile(n - 1, level) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": mean, "interval": None if half is None else [mean - half, mean + half], "n": n}


def paired(ours, theirs):
    """Differences ours - theirs over seeds {seed: loss} that both have -> mean_interval's, and "p": the
    two-sided paired t test's chance of so large a difference if there were none, None for fewer than two."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return mean_interval(differences) | {"p": p_of_zero(differences)} if differences else None


def p_of_zero(values):
    """Two-sided t test of a mean of zero; None for fewer than two values."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return two_sided(mean / error, len(values) - 1) if error else float(mean == 0)


def p_of(s):
    """The two-sided t test's p of a mean of zero, from mean_interval's 95% interval; None without one."""
    if not s or not s["interval"]:
        return None
    error = (s["interval"][1] - s["mean"]) / quantile(s["n"] - 1, 0.95)
    return two_sided(s["mean"] / error, s["n"] - 1) if error else float(s["mean"] == 0)


def holm(found):
    """{test: p} -> {test: p corrected for so many tests}, Holm's step-down: the smallest times their number,
    the next times one fewer, and so on, never falling and at most 1."""
    corrected, least = {}, 0.0
    for done, name in enumerate(sorted(found, key=found.get)):
        least = max(least, min(1.0, (len(found) - done) * found[name]))
        corrected[name] = least
    return corrected


def resampled(draw, seeds, rounds, count=1000):
    """The bootstrap over seeds and rounds of timing together -> the standard error of a mean over seeds.

    draw: function of the numbers of the rounds, drawn with replacement -> {seed: value}. Seeds are drawn too;
    the variance of n drawn ones is (n - 1)/n of what it should be, which is put right: without noise of the
    timing this is Student's standard error.
    """
    random_ = random.Random(0)
    means = []
    for _ in range(count):
        values = draw(random_.choices(range(rounds), k=rounds))
        means.append(statistics.fmean(values[seed] for seed in random_.choices(seeds, k=len(seeds))))
    return statistics.pstdev(means) * math.sqrt(len(seeds) / (len(seeds) - 1))


def two_sided(t, freedom):
    """P(|T| > |t|) of Student's t, the regularised incomplete beta I_x(freedom/2, 1/2) at
    x = freedom / (freedom + t^2) (Abramowitz & Stegun 26.7.1)."""
    return beta_share(freedom / (freedom + t * t), freedom / 2, 0.5)


@cache
def quantile(freedom, level):
    """The t with P(|T| <= t) = level, by halving."""
    low, high = 0.0, 1e4
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if two_sided(t, freedom) > 1 - level else (low, t)
    return low


def beta_share(x, a, b):
    """The regularised incomplete beta function I_x(a, b)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):                # where the fraction converges slowly: by symmetry
        return 1 - beta_share(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / a * beta_fraction(x, a, b)


def beta_fraction(x, a, b, terms=300):
    """Its continued fraction 1/(1+ d1/(1+ d2/(1+ ..., from the inside out (Abramowitz & Stegun 26.5.8)."""
    value = 1.0
    for i in range(terms, 0, -1):
        m = i // 2
        over = (a + i - 1) * (a + i)
        step = -(a + m) * (a + b + m) * x / over if i % 2 else m * (b - m) * x / over
        value = 1 + step / value
    return 1 / value
