"""normflows' convolutional flow as a pure flow of this library, to be evaluated by its certificate.

Names become those of residual-flows, which normflows' layers come from; see
:mod:`iresnet_jax.interop.residual_flows`.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

import iresnet_jax as ir
from benchmarks.likelihood.problems import Floats, in_parts
from iresnet_jax.fitting import final_estimator
from iresnet_jax.interop.residual_flows import flow_from_residual_flows

State = Mapping[str, np.ndarray]

_AT_ONCE = 250


def converted(state: State, image_shape: tuple[int, int, int], norm: float) -> ir.Flow:
    """Return the flow of a ``ConvolutionalFlow``'s state dict, on images after the first squeeze.

    Args:
      state: names to arrays.
      image_shape: (height, width, channels) before the squeeze.
      norm: that its layers were constrained to.
    """
    height, width, channels = image_shape
    return flow_from_residual_flows(renamed(state), (height // 2, width // 2, 4 * channels), norm)


def renamed(state: State) -> dict[str, np.ndarray]:
    """Return the state dict under the names of residual-flows."""
    found: dict[str, np.ndarray] = {}
    for name, array in state.items():
        _, scale, index, rest = name.split(".", 3)
        own = f"transforms.{scale}.chain.{index}."
        if rest == "s":  # (x − t)·exp(−s)
            found[own + "weight"] = -array.reshape(-1)
            found[own + "initialized"] = np.int64(1)  # type: ignore[assignment]
        elif rest == "t":
            found[own + "bias"] = -array.reshape(-1)
        elif rest != "data_dep_init_done":
            inner = rest.removeprefix("iresblock.").replace("nnet.net.", "nnet.")
            found[own + inner] = array
    return found


def squeezed(points: Floats, image_shape: tuple[int, int, int]) -> Floats:
    """Return flat images [n, dim] as 2×2 patches, channels (channel, row, column), for the flow."""
    height, width, channels = image_shape
    patches = points.reshape(-1, height // 2, 2, width // 2, 2, channels)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(-1, height // 2, width // 2, 4 * channels)


def certified_log_prob(
    state: State, image_shape: tuple[int, int, int], norm: float
) -> tuple[Callable[[Floats], Floats], str] | None:
    """Return points [n, dim] -> log p in nats, without bias, and by what; None if not certified."""
    flow = converted(state, image_shape, norm)
    certificate = ir.certify(flow)
    estimator = final_estimator(max(certificate.lipschitz, default=0.0))
    if not certificate.certified or isinstance(estimator, ir.Exact):
        return None
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    log_prob = jax.jit(lambda x, key: flow.log_prob(x, estimator, key=key))

    def of_points(points: Floats) -> Floats:
        x = squeezed(points, image_shape)
        return in_parts(lambda part: log_prob(part, next(keys)), x, _AT_ONCE)

    return of_points, estimator.describe()
