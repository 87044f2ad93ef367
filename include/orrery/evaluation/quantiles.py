"""Quantiles of Student's t and of chi-square in plain Python: what decides must not wait for numpy or scipy."""

from __future__ import annotations

from statistics import NormalDist


def student_quantile(share: float, freedom: float) -> float:
    """Return Student's t quantile from the normal one (Abramowitz & Stegun 1964, 26.7.5).

    Within 0.1 % from 9 degrees of freedom and 0.5 % from 4, for shares up to 0.975.
    """
    z, v = NormalDist().inv_cdf(share), float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def chi_square_quantile(share: float, freedom: int) -> float:
    """Return the chi-square quantile (Wilson & Hilferty 1931); within 1.2 % at 0.999 from 5 degrees of freedom."""
    spread = 2 / (9 * freedom)
    cube: float = (1 - spread + NormalDist().inv_cdf(share) * spread**0.5) ** 3
    return freedom * max(0.0, cube)
