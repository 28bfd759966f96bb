"""AGC as published, unit by unit in float64: Brock et al. 2021, equation 3, with eps."""

from __future__ import annotations

import math

import numpy as np


def clipped(weight: np.ndarray, gradient: np.ndarray, clipping: float, eps: float = 1e-3) -> np.ndarray:
    """Return what AGC leaves of a true gradient. A unit is an index of the first dimension; a vector is one."""
    if weight.ndim <= 1:
        return clipped_unit(weight, gradient, clipping, eps)
    units = [clipped_unit(w, g, clipping, eps) for w, g in zip(weight, gradient)]
    return np.stack(units) if units else gradient.copy()


def clipped_unit(weight: np.ndarray, gradient: np.ndarray, clipping: float, eps: float) -> np.ndarray:
    largest = clipping * max(norm_of(weight), eps)
    norm = norm_of(gradient)
    return gradient * (largest / max(norm, 1e-6)) if norm > largest else gradient.copy()


def norm_of(values: np.ndarray) -> float:
    return math.sqrt(float(np.sum(np.abs(values) ** 2)))
