"""Types that several modules annotate their arrays and functions with."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float

#: A residual branch g: [batch, ...] -> [batch, ...].
Branch = Callable[[Array], Array]

#: An array on a device or on the host, for functions that take either.
AnyArray = Array | np.ndarray

#: Likewise, for functions that return the kind they take.
SameArray = TypeVar("SameArray", np.ndarray, Array)

#: One array of any shape per sample.
Samples = Float[Array, "batch *event"]

#: One number per sample.
PerSample = Float[Array, " batch"]

Scalar = Float[Array, ""]
