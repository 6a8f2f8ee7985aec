"""Certify a flow, or any model that holds invertible blocks."""

import math

import flax.linen as nn

from iresnet_jax.bijections import Bijection
from iresnet_jax.certificates import Certificate, in_a_row
from iresnet_jax.conditional import ConditionalFlow
from iresnet_jax.flows import Flow
from iresnet_jax.nn.models import FlowModel
from iresnet_jax.nn.variables import Variables, parts_of


def certify(
    network: Flow | ConditionalFlow | nn.Module,
    variables: Variables | None = None,
    *inputs: object,
    **options: object,
) -> Certificate:
    """Bound every layer, every block and the whole network rigorously, with the verdict.

    A layer without a finite bound (NaN or infinite weights), weights that are not finite, a block
    with L ≥ 1, or a branch or stage that states no ``lipschitz_bound()`` leaves the network not
    certified, and is named. What such a method states is taken at its word.

    Args:
      network: a flow, conditional or not, with concrete weights (not under ``jit``); a model of
        this library; or any Flax model that holds an :class:`iresnet_jax.nn.Stack`.
      variables: of the model, all that init returned. Kernels are constrained with the singular
        vectors at hand: pass those of :func:`iresnet_jax.nn.converge` for the network that is to be
        shipped.
      *inputs: what a model of your own is applied to.
      **options: of its ``apply``.

    Returns:
      The certificate. Of a model of your own it has the blocks of all stacks, by the stacks' paths;
      ``forward`` and ``inverse`` are infinite then, because what lies between stacks is not known.

    Raises:
      ValueError: for variables that do not fit the model; for a model in which no stack is found.
      TypeError: for anything else, such as a chain, whose bounds depend on the shape that a flow
        would tell; for a model without variables.
    """
    if isinstance(network, Flow | ConditionalFlow):
        return network.certify()
    _check_model(network)
    if variables is None:
        raise TypeError(f"certify({type(network).__name__}, …) needs the model's variables.")
    if isinstance(network, FlowModel):
        return network.flow(variables).certify()
    stacks = parts_of(network, variables, *inputs, **options).stacks
    if not stacks:
        raise ValueError(
            f"No iresnet_jax.nn.Stack was found in {type(network).__name__}: there is nothing to "
            "certify."
        )
    uses = [use for stack in stacks.values() for use in enumerate(stack)]
    whole = in_a_row(placed.certify(f", use {i + 1}" if i else "") for i, placed in uses)
    return Certificate(whole.blocks, math.inf, math.inf, whole.problems)


def _check_model(network: object) -> None:
    """Refuse what is no Flax model, by a TypeError that says what to do instead."""
    if isinstance(network, nn.Module):
        return
    name = getattr(network, "__name__", type(network).__name__)
    if isinstance(network, Bijection):
        raise TypeError(
            f"A {name} does not know the shape of its inputs, and its bounds depend on it: "
            "certify ir.Flow((bijection,), event_shape)."
        )
    raise TypeError(
        f"certify takes an ir.Flow, or a Flax model with its variables; got {name}. A bijection "
        "is certified as ir.Flow((bijection,), event_shape), a branch g as that of "
        "ir.Residual(g)."
    )
