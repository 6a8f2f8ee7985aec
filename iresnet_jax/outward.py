"""Host arithmetic of bounds that must not come out too small."""

import sys


def product_above(*factors: float) -> float:
    """Multiply numbers ≥ 0 in order; what underflows is the smallest normal number, not 0.

    The result is 0 only if a factor is. Each product is rounded to nearest: margins are the
    caller's.
    """
    product = 1.0
    for factor in factors:
        positive = product > 0.0 and factor > 0.0
        product *= factor
        if positive and product < sys.float_info.min:
            product = sys.float_info.min
    return product
