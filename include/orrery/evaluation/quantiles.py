"""Student's quantile in plain Python: what decides must not wait for numpy or scipy."""

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
