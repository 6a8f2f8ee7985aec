"""How bijections compose: keys, names, and what a certificate refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bijection_cases import (
    actnorm,
    block,
    image_residual,
    image_stack,
    residual,
    stacked,
)
from helpers import unconverged

from iresnet_jax import (
    ActNorm,
    Center,
    Chain,
    Error,
    Exact,
    FixedPointIteration,
    Flow,
    Logit,
    Pad,
    Squeeze,
    TruncatedSeries,
)
from iresnet_jax.bijections import branch_bounds

KEY = jax.random.key(0)


# Keys


@pytest.mark.parametrize("shape", [(), (2,), (4,), (4, 3), (1, 3)], ids=str)
@pytest.mark.parametrize(
    "bijection",
    [
        Chain((residual(0), actnorm(0), block(1), residual(2))),
        stacked(residual(0), residual(1), residual(2)),
        stacked(*(Chain((actnorm(i), residual(i))) for i in range(3))),
        Chain((stacked(block(0), block(1)), Chain((block(2),)))),
        stacked(Chain((residual(0), residual(1), residual(2)))),
    ],
    ids=["chain", "stack", "stack of chains", "chain of stack", "deep block"],
)
def test_keys_of_another_number_are_refused(bijection, shape):
    keys = jax.random.split(KEY, shape) if shape else KEY
    message = f"Keys are needed for 3 blocks, [3] or [3, batch]; got {shape}."
    with pytest.raises(ValueError, match=re.escape(message)):
        bijection.forward_and_log_det(jnp.ones((3, 3)), TruncatedSeries(2), keys)


def test_a_seed_in_place_of_keys_is_named():
    with pytest.raises(TypeError, match=r"must come from jax.random.key\(seed\).*; got 0"):
        residual(0).forward_and_log_det(jnp.ones((4, 3)), TruncatedSeries(2), 0)


def test_a_single_block_refuses_the_keys_of_its_samples():
    keys = jax.random.split(KEY, 4)
    with pytest.raises(ValueError, match=r"Keys are needed for 1 blocks.*got \(4,\)"):
        residual(0).forward_and_log_det(jnp.ones((4, 3)), TruncatedSeries(2), keys)


@pytest.mark.parametrize("bijection", [residual(0), block(0), stacked(block(0), block(1))])
def test_an_estimator_that_draws_says_that_it_needs_a_key(bijection):
    with pytest.raises(ValueError, match="TruncatedSeries draws: pass a key"):
        bijection.forward_and_log_det(jnp.ones((2, 3)), TruncatedSeries(2))


# Names


@pytest.mark.parametrize(
    ("bijection", "names"),
    [
        (residual(0), ["it"]),
        (block(0), ["it"]),
        (Chain((residual(0), actnorm(0), residual(1))), ["it, part 0", "it, part 1"]),
        (Chain((block(0), stacked(block(1), block(2)))), ["it, part 0"] + ["it, part 1"] * 2),
        (stacked(block(0), block(1)), ["it, block 0", "it, block 1"]),
        (stacked(block(0), block(1), name="scale 2"), ["scale 2, block 0", "scale 2, block 1"]),
        (actnorm(0), []),
    ],
    ids=range(7),
)
def test_solves_and_blocks_are_named_by_their_place(bijection, names):
    found = bijection.solve_names("it")
    assert [name[: len(own)] for name, own in zip(found, names, strict=True)] == names
    assert [b.name for b in bijection.certify("it", (3,)).blocks] == found


def test_a_stack_certifies_each_block_as_one():
    pair = Chain((residual(0), actnorm(0), residual(1)))
    certificate = stacked(pair, Chain((residual(2), actnorm(1), residual(3)))).certify("it", (3,))
    assert [len(b.branches) for b in certificate.blocks] == [2, 2]
    own = [branch.lipschitz for branch in certificate.branches]
    assert certificate.lipschitz == [max(own[:2]), max(own[2:])]
    names = [layer.name for layer in certificate.blocks[1].layers]
    assert names == [f"it, block 1, part {i}, layer {j}" for i in (0, 1) for j in (0, 1)]


# Verdicts


def expansion():
    big = jax.tree.map(lambda leaf: 4.0 * leaf, residual(9))
    return dataclasses.replace(big, lipschitz=None)


@pytest.mark.parametrize(
    "bijection",
    [
        Chain((residual(0), expansion(), actnorm(0))),
        stacked(residual(0), expansion()),
        stacked(stacked(residual(0), residual(1)), stacked(residual(2), expansion())),
    ],
    ids=["chain", "stack", "stack of stacks"],
)
def test_one_expansion_leaves_all_uncertified(bijection):
    certificate = bijection.certify("it", (3,))
    assert not certificate.certified and len(certificate.failures) == 1
    (failed,) = certificate.failures
    assert "is not below 1" in failed.problem and np.isinf(certificate.inverse)
    assert failed is certificate.blocks[-1] and np.isfinite(certificate.forward)
    bounded = bijection.with_bounds(branch_bounds(certificate.branches))
    assert not bounded.contracts


TINY = ActNorm(jnp.full(3, -1000.0), jnp.zeros(3))
IMAGE = (2, 4, 3)
ON_IMAGES = image_residual(0, IMAGE[:2], 3)


@pytest.mark.parametrize(
    ("links", "of_data", "misplaced"),
    [
        ((Logit(), ON_IMAGES), True, ()),
        ((Chain((Center(),)), ON_IMAGES), True, ()),
        ((Squeeze(), Logit()), True, ()),
        ((Pad(1), Squeeze(), Center()), True, ()),
        ((actnorm(0), Logit()), False, ("Logit",)),
        ((Center(), Logit()), True, ("Logit",)),
        ((ON_IMAGES, Squeeze(), Center(), Logit()), False, ("Center", "Logit")),
        ((actnorm(0), Chain((Squeeze(), Logit()))), False, ("Chain",)),
    ],
    ids=range(8),
)
def test_links_for_data_in_the_unit_interval_are_to_see_the_data(links, of_data, misplaced):
    """Their slopes are those on [0, 1]: behind another link they are no bound."""
    certificate = Chain(links).certify("it", IMAGE)
    assert certificate.certified == (not misplaced)
    expected = tuple(f"{name} is to see the data, and follows others" for name in misplaced)
    assert certificate.problems == expected
    assert Chain(links).takes_unit_interval == of_data


@pytest.mark.parametrize("depth", [1, 2])
def test_only_the_first_of_a_stack_sees_the_data(depth):
    pair = stacked(*(Chain((Logit(), residual(seed))) for seed in range(depth)))
    assert pair.takes_unit_interval
    expected = ("it, block 1 is to see the data, and follows others",) if depth == 2 else ()
    assert pair.certify("it", (3,)).problems == expected
    later = Chain((residual(7), pair)).certify("it", (3,))
    assert "Stack is to see the data, and follows others" in later.problems


LATE = {
    "chain": (3, residual(0), Logit()),
    "nested chains": (3, Chain((residual(0),)), Chain((Chain((Logit(),)),))),
    "chain in a chain": (3, Chain((residual(0), Logit())), residual(1)),
    "stack": (3, residual(0), stacked(Chain((Logit(), residual(1))))),
    "stack of two": (3, stacked(*(Chain((Logit(), residual(i))) for i in range(2)))),
    "stack of stacks": (3, stacked(stacked(*(Chain((Logit(), residual(i))) for i in range(2))))),
    "chain in a stack": (3, stacked(Chain((actnorm(0), Chain((Logit(),)))))),
    "scales of zero": (3, stacked(Chain((actnorm(0), Logit())), Chain((TINY, Logit())))),
}


@pytest.mark.parametrize("name", LATE)
def test_a_logit_that_comes_late_leaves_no_bound_wherever_it_is(name):
    dim, *links = LATE[name]
    levels = {
        "one level": ((Chain(tuple(links)),), dim),
        "first level": ((Chain(tuple(links)), actnorm(0, 2)), dim),
        "second level": ((actnorm(0, 6), Chain(tuple(links))), 2 * dim),
    }
    for parts, size in levels.values():
        certificate = Flow(parts, (size,)).certify()
        assert not certificate.certified
        assert certificate.forward == certificate.inverse == np.inf
        told = [*certificate.problems, *(block.problem for block in certificate.failures)]
        assert any("is to see the data, and follows others" in problem for problem in told)


@pytest.mark.parametrize("links", [(Logit(),), (Chain((Logit(),)),), (Squeeze(), Logit())], ids=str)
def test_a_logit_on_a_later_level_leaves_no_bound(links):
    certificate = Flow((Squeeze(), Chain(links)), (4, 4, 1)).certify()
    assert certificate.problems == ("level 1 is to see the data, and follows others",)
    assert certificate.forward == certificate.inverse == np.inf


@pytest.mark.parametrize("log_scale", [-1000.0, -740.0, 1000.0])
def test_scales_that_double_precision_does_not_hold_leave_no_bound(log_scale):
    """Subnormal ones have lost digits that no margin covers."""
    norm = ActNorm(jnp.full(3, log_scale), jnp.zeros(3))
    certificate = norm.certify("it", (3,))
    assert not certificate.certified and certificate.forward == certificate.inverse == np.inf


# Bounds


@pytest.mark.parametrize(
    ("bijection", "other"),
    [
        (residual(0), residual(1)),
        (block(0), block(1)),
        (stacked(block(0), block(1)), stacked(block(0), block(2))),
        (stacked(block(0), block(1)), stacked(block(1), block(0))),
        (
            stacked(stacked(residual(0), residual(1)), stacked(residual(2), residual(3))),
            stacked(stacked(residual(0), residual(2)), stacked(residual(1), residual(3))),
        ),
    ],
    ids=["residual", "chain", "stack", "stack in another order", "stack of stacks, transposed"],
)
def test_bounds_of_other_weights_are_refused(bijection, other):
    branches = other.certify("it", (3,)).branches
    with pytest.raises(ValueError, match="of other weights"):
        bijection.with_bounds(branch_bounds(branches))
    with pytest.raises(ValueError, match=r"of other weights .* block\.bounded_by"):
        bijection.bounded_by(other.certify("it", (3,)))
    bounded = bijection.bounded_by(bijection.certify("it", (3,)))
    assert bounded.contracts
    _, info = bounded.inverse(jnp.ones((2, 3)))
    assert bool(jnp.isfinite(info.error_bound).all())


@pytest.mark.parametrize("other", [Chain(()), residual(0), stacked(*map(residual, range(3)))])
def test_bounds_of_another_number_of_branches_are_refused(other):
    pair = stacked(residual(0), residual(1))
    count = other.num_branches
    with pytest.raises(ValueError, match=f"is of {count} branches; this network has 2"):
        pair.bounded_by(other.certify("it", (3,)))


def test_bounds_attach_under_jit_where_weights_have_no_values_to_compare():
    stack = stacked(block(0), block(1))
    branches = stack.certify("it", (3,)).branches
    told = jax.jit(lambda s: s.with_bounds(branch_bounds(branches)).block.links[1].lipschitz)(stack)
    np.testing.assert_allclose(told, [b.lipschitz for b in branches], rtol=1e-6)


# Inverses that fail


def test_a_flow_says_which_block_of_which_stack_failed():
    flow = Flow((Chain((image_stack(2, (2, 2), 1), image_stack(2, (2, 2), 1))),), (2, 2, 1))
    x = jax.random.normal(KEY, (3, 2, 2, 1))
    with unconverged(3, 3) as seen:
        _, info = flow.inverse((x,), FixedPointIteration(1e-9, 1e-9, max_steps=2))
    worst = flow.solve_names()[int(np.argmax(info.residual)) // 3]
    assert f"at {worst}, with a residual of" in str(seen[0].message)


# Padding


@pytest.mark.parametrize("num_channels", [0, 2])
def test_padding_is_a_link_without_a_log_determinant(num_channels):
    pad, x = Pad(num_channels), jax.random.normal(KEY, (2, 3, 3, 1))
    y = pad.forward(x)
    assert y.shape == (2, *pad.out_shape((3, 3, 1))) == (2, 3, 3, 1 + num_channels)
    np.testing.assert_array_equal(y[..., 1:], 0.0)
    np.testing.assert_array_equal(pad.inverse(y)[0], x)
    certificate = pad.certify("it", (3, 3, 1))
    assert (certificate.forward, certificate.inverse) == (1.0, 1.0) and certificate.certified
    error = Error(jnp.full(2, 0.1), jnp.full(2, 5.0))
    assert pad.inverse_error(error, None, (3, 3, 1)) == error
    for chain in (pad, Chain((pad, image_stack(1, (3, 3), 1 + num_channels)))):
        with pytest.raises(ValueError, match=f"{num_channels} padded .* no log-determinant"):
            chain.forward_and_log_det(x, Exact())
