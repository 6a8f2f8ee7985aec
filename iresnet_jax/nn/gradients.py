"""Gradients of a loss, with the power iterations advanced as a training step must."""

from collections.abc import Callable

import flax.linen as nn
import jax

from iresnet_jax.nn.variables import Variables, apply
from iresnet_jax.types import Scalar


def value_and_grad(
    model: nn.Module,
    loss: Callable[..., Scalar],
    variables: Variables,
    *inputs: object,
    **options: object,
) -> tuple[Scalar, Variables, Variables]:
    """Differentiate a loss of what a model returns by its parameters, its state one step on.

    The power iterations advance, and so do other collections that the model changes, such as
    BatchNorm's statistics. A training step is then
    ``variables = {**state, "params": new_params}``.

    Args:
      model: any Flax model that holds layers of this library.
      loss: a scalar function of what the model returns for ``inputs``; of the
        :class:`~iresnet_jax.flows.Flow` where a model of this library is given no inputs.
      variables: all that init returned.
      *inputs: what the model is applied to.
      **options: of ``model.apply``, such as ``rngs`` or a model's own ``train=True``.

    Returns:
      The loss, its gradient by the parameters, and the new state: all collections but "params".

    Raises:
      ValueError, TypeError: for variables that do not fit the model.
    """
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss_and_state(params: Variables) -> tuple[Scalar, Variables]:
        own = {"params": params, **state}
        out, updates = apply(model, own, *inputs, mutable=list(state), **options)
        return loss(out), {**state, **updates}

    differentiated = jax.value_and_grad(loss_and_state, has_aux=True)
    (value, new), grads = differentiated(variables["params"])
    return value, grads, new
