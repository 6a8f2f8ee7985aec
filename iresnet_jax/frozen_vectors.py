"""Singular vectors that stand still: when kernels may be differentiated all the same."""

import contextlib
import contextvars
from collections.abc import Iterator
from functools import partial
from typing import NoReturn, TypeVar

import jax
from jaxtyping import Array, Shaped

Tree = TypeVar("Tree")

_allowed = contextvars.ContextVar("frozen_vectors", default=False)


@contextlib.contextmanager
def frozen_vectors() -> Iterator[None]:
    """Within it, kernels may be differentiated while their singular vectors stand still.

    For derivatives of a network at one place, such as a Hessian. A training step must not do so:
    norms grow past ``coeff`` unseen, as kernels are divided by what their vectors see of the norm
    and nothing else. What ``jit`` has traced keeps what held then: trace within.
    """
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def vectors_are_frozen() -> bool:
    """Say whether this is within :func:`frozen_vectors`."""
    return _allowed.get()


def refuse_gradient(weights: Tree, layer: str) -> Tree:
    """Return the weights; differentiating them raises, unless within :func:`frozen_vectors`."""
    if _allowed.get():
        return weights
    guarded: Tree = jax.tree.map(lambda leaf: _without_gradient(leaf, layer), weights)
    return guarded


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_gradient(leaf: Shaped[Array, "*shape"], layer: str) -> Shaped[Array, "*shape"]:
    return leaf


@_without_gradient.defjvp
def _refuse(layer: str, primals: object, tangents: object) -> NoReturn:
    raise ValueError(
        f"The kernel of {layer} is differentiated while its power iteration stands still: its norm "
        "would grow past coeff unseen. In a training step let it advance, by "
        'flow, state = model.advance(variables), or apply(..., mutable=["spectral"]), and keep '
        'the state; or set normalize="bound". For derivatives of a network as it is, differentiate '
        "within iresnet_jax.nn.frozen_vectors()."
    )
