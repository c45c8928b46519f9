"""Intervals of measured shares."""

from __future__ import annotations

import math

Z_95 = 1.959964


def wilson_interval(wins: float, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval; ties count as half a win).

    Example: 8 of 10 -> (0.490, 0.943).
    """
    if count == 0:
        return 0.0, 1.0
    share, z2 = wins / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
