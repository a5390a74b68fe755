"""Loss as a function of model size and data, fitted to small runs.

    chinchilla    L(N, D) = E + A / N^alpha + B / D^beta        Hoffmann et al. 2022, arXiv 2203.15556, section 3.3
    power         L(C)    = E + A / C^alpha                      where sizes and tokens were not varied apart, or runs are few

N: parameters in matrix products, D: tokens, C: operations, L: nats a token. Fitted is log L, whose error is relative, with Huber's loss, which one odd
run does not pull away:

    min_theta  sum_i huber(log L(theta; x_i) - log L_i),    log L = logsumexp(a - alpha log N, b - beta log D, e),    A = exp a, ...

with delta = `noise`, how far runs lie apart that differ in their seed alone (the paper's 1e-3 is less than small runs have, and would pass
through some of them exactly). It begins at a grid of starts, each followed down by Levenberg and Marquardt's method on the weighted squares that Huber's
loss is near each point (weights min(1, delta / |r|)). All starts, and all resamples, go down together: a batch of 5 x 5 systems. numpy alone.

Few runs tell the floor E and the exponents badly apart: half a percent of noise turns an alpha of 0.5 into 1.7. So exponents of `chinchilla` far from those
that language models show pay for it: their logarithms are taken to be normal, to 0.5 (a factor of 1.65), around the corrected fit of Hoffmann's runs (Besiroglu
et al. 2024, arXiv 2404.10102). That far off costs as much as one run off by its noise: many runs, or a wide range of them, decide for themselves.

Uncertainty is that of a parametric bootstrap: losses are drawn anew around the fit, with the spread that the residuals show (and never less than two
runs of different seeds show), and fitted again. The spread of what those fits predict, with a fresh run's own noise added, is the interval.
"""
import itertools
import math
from dataclasses import dataclass

import numpy as np

COARSE, FINE = 25, 200  # iterations: of all starts, and of those that are best then
KEPT = 24
KINDS = ("chinchilla", "power")
STARTS = {  # how large each term is in the middle of the runs, log E, exponents: around what language models show; thinner than the paper's 4,500
    "chinchilla": tuple(itertools.product((2.0, 7.0, 12.0), (2.0, 7.0, 12.0), (-0.5, 0.7), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))),
    "power": tuple(itertools.product((0.0, 2.0, 5.0, 10.0, 15.0), (-3.0, -1.0, 0.0, 0.5, 1.0), (0.05, 0.1, 0.2, 0.4, 0.8))),
}
LEAST = {"chinchilla": 6, "power": 3}  # runs
EXPONENT = (0.01, 3.0)  # beyond, a term is flat or a step
KNOWN = {"chinchilla": (0.35, 0.37), "power": ()}  # alpha, beta of Besiroglu et al., table 1, rounded
KNOWN_TO = 0.5  # standard deviation of their logarithms


@dataclass(frozen=True)
class Points:
    """Runs: `size` N, `tokens` D, `compute` C (operations), `loss` L; float64 [n] each."""

    size: np.ndarray
    tokens: np.ndarray
    compute: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.size)

    def features(self, kind: str) -> np.ndarray:
        """Logarithms of what the law divides by, [n, terms]."""
        return np.log(np.stack((self.size, self.tokens), -1) if kind == "chinchilla" else self.compute[:, None])


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        kind: chinchilla | power.
        theta: [a, b, e, alpha, beta] or [a, e, alpha].
        spread: standard deviation of a run's log loss around the law.
        resamples: theta of each bootstrap fit, [m, len(theta)].
        objective: Huber's loss of the fit, with what its exponents cost.
    """

    kind: str
    theta: np.ndarray
    spread: float
    resamples: np.ndarray
    objective: float

    @property
    def constants(self) -> dict[str, float]:
        """E, A, alpha, and for chinchilla B and beta."""
        return constants(self.kind, self.theta)

    def loss(self, at: Points) -> np.ndarray:
        """Of each point, nats; [n]."""
        return np.exp(_log_loss(self.theta[None], at.features(self.kind))[0])

    def interval(self, at: Points, *, level: float = 0.9, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Between which losses a run at each point ends with probability `level`: [n] and [n]."""
        drawn = _log_loss(self.resamples, at.features(self.kind))
        drawn = drawn + self.spread * np.random.default_rng(seed).standard_normal(drawn.shape)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return np.exp(low), np.exp(high)

    def constant_intervals(self, *, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """The same for each constant."""
        each = [constants(self.kind, theta) for theta in self.resamples]
        ends = [(1 - level) / 2, (1 + level) / 2]
        return {name: tuple(float(value) for value in np.quantile([one[name] for one in each], ends)) for name in self.constants}

    def best_split(self, compute: float) -> tuple[float, float] | None:
        """(N, D) with the smallest loss at C = 6 N D operations (section 3.3 of the paper); None for a law of compute alone."""
        if self.kind != "chinchilla":
            return None
        found = self.constants
        alpha, beta = found["alpha"], found["beta"]
        gain = (alpha * found["A"] / (beta * found["B"])) ** (1 / (alpha + beta))
        size = gain * (compute / 6) ** (beta / (alpha + beta))
        return size, compute / 6 / size


def constants(kind: str, theta: np.ndarray) -> dict[str, float]:
    """theta by name."""
    terms = _terms(kind)
    values = {"E": math.exp(min(theta[terms], 700)), "A": math.exp(min(theta[0], 700)), "alpha": float(theta[terms + 1])}
    return values | ({"B": math.exp(min(theta[1], 700)), "beta": float(theta[terms + 2])} if terms == 2 else {})


def choose(points: Points) -> str:
    """chinchilla where sizes and tokens were varied apart and runs suffice, else power."""
    spread = np.linalg.svd(points.features("chinchilla") - points.features("chinchilla").mean(0), compute_uv=False)
    apart = len({round(value, 6) for value in points.features("chinchilla")[:, 0]}) > 1 and spread[-1] > 0.1 * spread[0]
    return "chinchilla" if apart and len(points) >= LEAST["chinchilla"] else "power"


def fit(points: Points, kind: str, *, noise: float = 0.005, resamples: int = 200, seed: int = 0) -> Law:
    """Fits a law and its uncertainty.

    Args:
        noise: least relative spread of the loss of runs that differ in their seed alone; what small numbers of runs cannot show.
        resamples: bootstrap fits.

    Raises:
        ValueError: fewer runs than `LEAST`, a loss that is not positive, runs that are all alike.
    """
    if len(points) < LEAST[kind]:
        raise ValueError(f"{len(points)} runs; {kind} needs {LEAST[kind]}")
    if not (points.loss > 0).all() or not np.isfinite(points.loss).all():
        raise ValueError("losses must be positive numbers")
    x, y = points.features(kind), np.log(points.loss)
    if np.ptp(x, axis=0).min() < 1e-9:
        raise ValueError("all runs have the same size, tokens or compute")
    starts = _starts(kind, x, y)
    goal = _Goal(noise, np.log(KNOWN[kind]))
    found, values = _descend(starts, x, np.broadcast_to(y, (len(starts), len(y))), COARSE, goal)
    found, values = _descend(found[np.argsort(values)[:KEPT]], x, np.broadcast_to(y, (min(KEPT, len(starts)), len(y))), FINE, goal)
    theta = found[values.argmin()]
    residuals = y - _log_loss(theta[None], x)[0]
    free = max(1, len(y) - len(theta))
    spread = max(noise, math.sqrt(float(residuals @ residuals) / free))
    drawn = (y - residuals) + spread * np.random.default_rng(seed).standard_normal((resamples, len(y)))
    # From the fit and from another good end: a resample's best one need not be next to it.
    others = found[np.argsort(values)][8::8]
    ends, costs = zip(*(_descend(np.broadcast_to(start, (resamples, len(start))), x, drawn, 60, goal) for start in (theta, *others)))
    best = np.argmin(costs, axis=0)
    return Law(kind, theta, spread, np.stack(ends)[best, np.arange(resamples)], float(values.min()))


# ---- the descent -----------------------------------------------------------------------------------------------------------------------


def _terms(kind: str) -> int:
    return 2 if kind == "chinchilla" else 1


def _starts(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The grid around the middle of the runs: a + ... is what a term has there, so that no start is far from all of them."""
    grid = np.array(STARTS[kind])
    terms = _terms(kind)
    exponents = grid[:, terms + 1 :]
    level = grid[:, :terms] / 5 - 2 + y.mean()  # log of a term's value at the middle: from 0.14 to 2.7 times the loss
    offsets = level + exponents * x.mean(0)
    return np.concatenate((offsets, grid[:, terms : terms + 1] - 1 + y.min(), exponents), axis=1)


def _parts(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Logarithms of the terms and of E: [batch, n, terms + 1]."""
    terms = x.shape[1]
    values = theta[:, None, :terms] - theta[:, None, terms + 1 :] * x
    return np.concatenate((values, np.broadcast_to(theta[:, None, terms : terms + 1], (*values.shape[:2], 1))), axis=2)


def _log_loss(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """theta [batch, p], x [n, terms] -> [batch, n]."""
    parts = _parts(theta, x)
    top = parts.max(-1, keepdims=True)
    return (np.log(np.exp(parts - top).sum(-1, keepdims=True)) + top)[..., 0]


@dataclass(frozen=True)
class _Goal:
    """What is made small: Huber's loss of the residuals, and what exponents far from known ones cost, both in units of (log loss)^2.

    Attributes:
        delta: of Huber's loss. centre: logarithms of the known exponents; empty where none are.
    """

    delta: float
    centre: np.ndarray

    @property
    def weight(self) -> float:
        return (self.delta / KNOWN_TO) ** 2

    def __call__(self, residuals: np.ndarray, exponents: np.ndarray) -> np.ndarray:
        """residuals [batch, n], exponents [batch, terms] -> [batch]."""
        size = np.abs(residuals)
        cost = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta)).sum(-1)
        return cost + 0.5 * self.weight * ((np.log(exponents) - self.centre) ** 2).sum(-1) if len(self.centre) else cost


def _descend(theta: np.ndarray, x: np.ndarray, y: np.ndarray, iterations: int, goal: _Goal) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt from each row of theta [batch, p] to its own y [batch, n]; the ends and the objective there [batch]."""
    terms, damping = x.shape[1], np.full(len(theta), 1e-2)
    theta = theta.copy()
    residuals = _log_loss(theta, x) - y
    cost = goal(residuals, theta[:, terms + 1 :])
    for _ in range(iterations):
        shares = np.exp(_parts(theta, x) - (residuals + y)[..., None])  # of each term in the loss
        jacobian = np.concatenate((shares, -shares[..., :terms] * x), axis=2)
        weights = np.minimum(1.0, goal.delta / np.maximum(np.abs(residuals), 1e-300))
        normal = np.einsum("bni,bn,bnj->bij", jacobian, weights, jacobian)
        gradient = np.einsum("bni,bn->bi", jacobian, weights * residuals)
        if len(goal.centre):
            exponents, places = theta[:, terms + 1 :], range(terms + 1, theta.shape[1])
            gradient[:, terms + 1 :] += goal.weight * (np.log(exponents) - goal.centre) / exponents
            normal[:, places, places] += goal.weight / exponents**2
        diagonal = np.einsum("bii->bi", normal)
        scaled = normal + (damping[:, None] * np.maximum(diagonal, 1e-12) + 1e-14)[:, :, None] * np.eye(theta.shape[1])
        tried = theta - np.linalg.solve(scaled, gradient[..., None])[..., 0]
        tried[:, terms + 1 :] = tried[:, terms + 1 :].clip(*EXPONENT)
        tried[:, : terms + 1] = tried[:, : terms + 1].clip(-30.0, 80.0)
        there = _log_loss(tried, x) - y
        value = goal(there, tried[:, terms + 1 :])
        better = value < cost
        theta[better], residuals[better] = tried[better], there[better]
        moved = np.where(better, cost - value, 0.0)
        cost = np.where(better, value, cost)
        damping = np.where(better, damping / 3, damping * 4).clip(1e-9, 1e9)
        if not (moved > 1e-12 * np.maximum(cost, 1e-12)).any() and (damping > 1e6).all():
            break
    return theta, cost
