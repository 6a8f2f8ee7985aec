"""A stack, run by a scan, against the chain of its blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bijection_cases import bounded, cases, residual, stacked
from cases import quick_jit

from iresnet_jax import Anderson, Chain, Error, Exact, Stack, TruncatedSeries, block_keys
from iresnet_jax.bijections import branch_bounds

KEY = jax.random.key(0)


def unstacked(bijection):
    """A chain of single blocks that is the same map."""
    if isinstance(bijection, Stack):
        return Chain(tuple(unstacked(part) for part in bijection.unstacked()))
    if isinstance(bijection, Chain):
        return Chain(tuple(unstacked(link) for link in bijection.links))
    return bijection


STACKS = [name for name in cases() if "stack" in name]
#: Parts of what the two larger ones hold.
REPEATED = ("stack of chains", "stack that recomputes")


def stacks(*in_minutes):
    """All stacks by name, these of them among the slow tests: they repeat what others show."""
    return pytest.mark.parametrize(
        "name",
        [pytest.param(s, marks=pytest.mark.slow if s in in_minutes else []) for s in STACKS],
    )


@stacks(
    "stack of residuals",
    "stack of monotones",
    "stack with mixing",
    "chain of squeeze and stacks",
    *REPEATED,
)
def test_a_stack_is_the_chain_of_its_blocks(name):
    """With the same keys, and with the bounds of its certificate."""
    case, (stack, certificate) = cases()[name], bounded(name)
    loop = unstacked(case.bijection).with_bounds(branch_bounds(certificate.branches))
    x, keys = jnp.asarray(case.draw(3)), block_keys(KEY, stack.num_branches, 3)

    @quick_jit
    def evaluate(bijection):
        y, log_det = bijection.forward_and_log_det(x, TruncatedSeries(3), keys)
        back, info = bijection.inverse(y, Anderson(1e-3))
        start = Error(jnp.full(3, 1e-4), jnp.full(3, 100.0))
        return y, log_det, back, info, bijection.inverse_error(start, info, case.shape)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, evaluate(stack), evaluate(loop))
    looped = loop.certify("it", case.shape)
    ours, theirs = ((c.forward, c.inverse) for c in (certificate, looped))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert [b.lipschitz for b in certificate.branches] == [b.lipschitz for b in looped.branches]


@stacks(
    *("stack of residuals", "stack of monotones", "stack with mixing", "stack of stacks"),
    "stack of chains",
)
def test_gradients_pass_through_stacks_as_through_loops(name):
    case = cases()[name]
    x = jnp.asarray(case.draw(3))

    def loss(bijection, x):
        y, log_det = bijection.forward_and_log_det(x, Exact())
        return jnp.sum(jnp.sin(y)) + jnp.sum(log_det)

    gradient = quick_jit(jax.grad(loss, argnums=1))
    ours, theirs = gradient(case.bijection, x), gradient(unstacked(case.bijection), x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stack_of_another_depth_than_its_weights_is_refused(depth):
    pair = stacked(residual(0), residual(1))
    with pytest.raises(ValueError, match="scan"):
        dataclasses.replace(pair, depth=depth).forward(jnp.ones((2, 3)))
