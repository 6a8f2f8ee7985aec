"""Types that several modules annotate their arrays and functions with."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import Array, Float, Inexact, Key, UInt32

#: A residual branch g: [batch, ...] -> [batch, ...].
Branch = Callable[[Array], Array]

#: An array on a device or on the host, for functions that take either.
AnyArray = Array | np.ndarray

#: Likewise, for functions that return the kind they take.
SameArray = TypeVar("SameArray", np.ndarray, Array)

#: One array of any shape per sample.
Samples = Float[Array, "batch *event"]

#: A batch; unlike ``Samples``, a function may return it in another shape than it takes.
Batch = Float[Array, "batch ..."]

#: Of one sample, without batch axis.
Shape = tuple[int, ...]

#: A row of keys for each branch, as of :func:`~iresnet_jax.probes.block_keys`.
Keys = Key[Array, "..."] | UInt32[Array, "..."] | None

#: Many matrices of one shape, real or complex.
Matrices = Inexact[Array, "number rows columns"]

#: One number per sample.
PerSample = Float[Array, " batch"]

Scalar = Float[Array, ""]
