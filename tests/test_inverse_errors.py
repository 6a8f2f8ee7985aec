"""Errors of the inverses of whole networks, guaranteed and estimated, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import build, in_double, norms, quick_jit

from iresnet_jax import (
    FixedPointIteration,
    UnconvergedError,
    UnconvergedWarning,
    certify,
    inverse_error_bound,
    inverse_error_in_double,
    latent_residual,
)

NAMES = ["vector", "image", "image-logit", "classifier"]
DEFAULT = FixedPointIteration()
there_and_back = quick_jit(lambda flow, x: invert(flow, flow.forward(x)))


def invert(flow, latents, solver=DEFAULT):
    back, info = flow.inverse(latents, solver)
    bound = inverse_error_bound(flow, info)
    return latents, back, info, bound, latent_residual(flow, back, latents)


@pytest.mark.parametrize("name", NAMES)
def test_error_at_the_data_is_within_the_bounds(name):
    _, _, flow, x = build(name)
    flow = flow.with_bounds()
    solver = FixedPointIteration(rtol=0.0, atol=2e-15, max_steps=1000)
    invert_in_double = quick_jit(lambda flow, z: flow.inverse(z, solver))
    latents, back, _, bound, residual = there_and_back(flow, x)
    with jax.enable_x64(True):
        exact, info = invert_in_double(in_double(flow), in_double(latents))
        assert bool(info.converged.all())
    error = norms(np.asarray(back, np.float64) - np.asarray(exact))
    sharp = inverse_error_in_double(flow, back, latents)
    assert (error <= bound).all() and (bound < 1e-1).all()
    assert (error <= sharp).all() and (sharp <= error + 1e-9).all()
    assert (residual > 0.0).all()
    assert (residual <= certify(flow).forward * error + 1e-4).all()


def test_a_loose_inverse_is_bounded_too_and_seen_at_the_latents():
    _, _, flow, x = build("vector")
    flow = flow.with_bounds()
    solver = FixedPointIteration(max_steps=2)
    loose = quick_jit(lambda flow, x: invert(flow, flow.forward(x), solver))
    _, back, info, bound, residual = loose(flow, x)
    assert not bool(info.converged.any())
    error = norms(back - x)  # far above rounding
    assert (error > 1e-2).all() and (error <= bound).all() and (residual > 1e-3).all()


def test_without_bounds_nothing_is_guaranteed():
    _, _, flow, x = build("vector")
    *_, bound, residual = there_and_back(flow, x)
    assert np.isinf(bound).all() and np.isfinite(residual).all()


def test_an_error_tolerance_is_met_in_every_block():
    _, _, flow, x = build("image")
    flow = flow.with_bounds()
    latents = flow.forward(x)
    loose, strict = (FixedPointIteration(error_tolerance=tolerance) for tolerance in (1e-2, 1e-8))
    _, info = quick_jit(lambda flow, z: flow.inverse(z, loose))(flow, latents)
    assert bool(info.converged.all()) and (info.error_bound <= 1e-2 * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match=r"sample \d at scale \d, block \d cannot fall below"):
        flow.inverse(latents, strict)
    with pytest.raises(ValueError, match=r"flow\.with_bounds"):
        build("image").flow.inverse(latents, loose)


def test_samples_that_are_not_finite_have_no_bound():
    _, _, flow, x = build("vector")
    flow = flow.with_bounds()
    (latents,) = flow.forward(x)
    _, _, _, bound, _ = quick_jit(invert)(flow, (latents.at[1, 0].set(jnp.nan),))
    np.testing.assert_array_equal(np.isinf(bound), [False, True, False])


def test_an_inverse_that_missed_its_tolerance_warns_and_names_the_worst():
    _, _, flow, x = build("image")
    latents, solver = flow.forward(x), FixedPointIteration(max_steps=2)
    message = r"3 of 3 inverses did not meet.*sample \d at scale \d, block \d.*after 2 steps"
    with pytest.warns(UnconvergedWarning, match=message):
        _, info = flow.inverse(latents, solver)
    worst = np.unravel_index(np.argmax(info.residual), info.residual.shape)
    name = f"sample {worst[1]} at {flow.solve_names()[worst[0]]}, with a residual"
    with pytest.raises(UnconvergedError, match=name):
        info.check(flow.solve_names())
    _, jitted = quick_jit(lambda flow, z: flow.inverse(z, solver))(flow, latents)  # silent
    with pytest.raises(UnconvergedError, match="3 of 3 inverses"):
        jitted.check()


def test_a_draw_that_missed_its_tolerance_warns_and_one_that_met_it_does_not():
    flow = build("vector").flow
    with pytest.warns(UnconvergedWarning, match="2 of 2 inverses"):
        flow.sample(jax.random.key(0), 2, solver=FixedPointIteration(max_steps=1))
    _, info = flow.sample(jax.random.key(0), 2)
    info.check(flow.solve_names())
