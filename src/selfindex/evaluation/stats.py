"""Bootstrap intervals over blocks of neighbouring queries, stratified by text window."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]
BLOCK = 8  # neighbouring queries are resampled together


def mean(x: Array) -> float:
    """Mean over everything."""
    return float(x.mean())


def p5(x: Array) -> float:
    """5th percentile over everything."""
    return float(np.quantile(x, 0.05))


def _blocks(windows: list[Array], block: int) -> list[list[Array]]:
    return [np.array_split(w, max(1, len(w) // block)) for w in windows]


def bootstrap(
    windows: list[Array],
    statistic: Statistic = mean,
    resamples: int = 1000,
    seed: int = 0,
    block: int = BLOCK,
) -> list[float]:
    """[estimate, low, high] (95 %) of a statistic; each window is an array [queries, ...].

    `block` neighbours are resampled together: 1 for independent samples.
    """
    if statistic is mean:  # averages of blocks suffice
        windows = [w.reshape(len(w), -1).mean(1) for w in windows]
    rng = np.random.default_rng(seed)
    blocks = _blocks(windows, block)
    values = []
    for _ in range(resamples):
        picked = [b[i] for b in blocks for i in rng.integers(0, len(b), len(b))]
        values.append(statistic(np.concatenate(picked)))
    low, high = np.quantile(values, [0.025, 0.975])
    return [round(float(x), 5) for x in (statistic(np.concatenate(windows)), low, high)]


def difference(a: list[Array], b: list[Array], resamples: int = 1000) -> list[float]:
    """[estimate, low, high] of mean(a) - mean(b), paired by query."""
    pairs = [(x - y).reshape(len(x), -1).mean(1) for x, y in zip(a, b, strict=True)]
    return bootstrap(pairs, mean, resamples)


def mean_of_means(windows: list[Array], resamples: int = 2000, seed: int = 0) -> list[float]:
    """[estimate, low, high] (95 %) of the mean over windows of their means, samples resampled within each."""
    rng = np.random.default_rng(seed)
    drawn = [w[rng.integers(0, len(w), (resamples, len(w)))].mean(1) for w in windows]
    low, high = np.quantile(np.mean(drawn, 0), [0.025, 0.975])
    estimate = np.mean([w.mean() for w in windows])
    return [round(float(x), 5) for x in (estimate, low, high)]


def wilson(values: Array) -> list[float]:
    """[mean, low, high] (95 %) of scores from 0 to 1, by Wilson's interval.

    Meant for right or wrong, it is wider than need be for scores in between; unlike the bootstrap's, its
    width is not zero where all samples agree.
    """
    n, p, z = len(values), float(values.mean()), 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [round(x, 5) for x in (p, max(0.0, middle - half), min(1.0, middle + half))]
