"""Errors of the inverses of whole networks, guaranteed and estimated, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bijection_cases import actnorm, image_stack, residual
from cases import build, in_double, norms, quick_jit
from helpers import rest_slow

from iresnet_jax import (
    ActNorm,
    Center,
    Chain,
    FixedPointIteration,
    Flow,
    Squeeze,
    UnconvergedError,
    UnconvergedWarning,
    certify,
    inverse_error_bound,
    inverse_error_in_double,
    latent_residual,
)

DEFAULT = FixedPointIteration()
there_and_back = quick_jit(lambda flow, x: invert(flow, flow.forward(x)))


def invert(flow, latents, solver=DEFAULT):
    back, info = flow.inverse(latents, solver)
    bound = inverse_error_bound(flow, info)
    return latents, back, info, bound, latent_residual(flow, back, latents)


@pytest.mark.parametrize(
    "name",
    rest_slow(["vector", "image", "image-logit", "classifier"], "vector", "image-logit"),
)
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


ENDING_IN_ACTNORM = {
    "actnorm": Flow((actnorm(0),), (3,)),
    "center": Flow((Center(),), (3,)),
    "one level": Flow((Chain((residual(0), actnorm(0))),), (3,)),
    "three levels": Flow(
        (
            Chain((Squeeze(), image_stack(2, (2, 2), 4), actnorm(1, 4))),
            Chain((actnorm(2, 2), image_stack(1, (2, 2), 2), actnorm(3, 2))),
            Chain((actnorm(4, 1), actnorm(5, 1))),
        ),
        (4, 4, 1),
    ),
}


@quick_jit
def invert_and_bound(flow, latents):
    """By float32, and its error bounds with and without the norms of the latents."""
    back, info = flow.inverse(latents, FixedPointIteration(1e-6))
    return back, inverse_error_bound(flow, info, latents), inverse_error_bound(flow, info)


@quick_jit
def invert_to_the_end(flow, latents):
    return flow.inverse(latents, FixedPointIteration(rtol=1e-14, atol=1e-14, max_steps=1000))[0]


@pytest.mark.parametrize("size", rest_slow([1e-3, 1.0, 1e4], 1e-3, 1e4))
@pytest.mark.parametrize("name", rest_slow(ENDING_IN_ACTNORM, "center", "three levels"))
def test_levels_that_end_in_actnorm_are_bounded_by_the_norms_of_the_latents(name, size):
    flow = ENDING_IN_ACTNORM[name].with_bounds()
    shapes = flow.latent_shapes()
    keys = jax.random.split(jax.random.key(3), len(shapes))
    pairs = zip(keys, shapes, strict=True)
    latents = tuple(size * jax.random.normal(key, (20, *shape)) for key, shape in pairs)
    back, bound, without_norms = invert_and_bound(flow, latents)
    with jax.enable_x64(True):
        exact = invert_to_the_end(in_double(flow), in_double(latents))
    error = norms(np.asarray(back, np.float64) - np.asarray(exact))
    assert (error <= bound).all() and (bound <= 0.1 * (1.0 + size)).all()
    assert np.isinf(without_norms).all()
    sharp = inverse_error_in_double(flow, back, latents, tolerance=1e-13 * (1.0 + size))
    assert (error <= sharp).all() and (sharp <= error + 1e-8 * (1.0 + size)).all()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-25, 1.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, 1e-40, 1e-25, 1.0])
@pytest.mark.parametrize("log_scale", [-80.0, -60.0, 0.0, 60.0, 87.5, 100.0])
def test_the_rounding_of_actnorm_counts_what_is_flushed_to_zero(log_scale, shift, size):
    rng = np.random.default_rng(0)
    norm = ActNorm(jnp.full(2, log_scale, jnp.float32), jnp.full(2, shift, jnp.float32))
    z = jnp.asarray(size * rng.normal(size=(10, 2)), jnp.float32)
    flow = Flow((norm,), (2,))
    back, info = flow.inverse((z,))
    error = flow.inverse_error(info, (z,))
    difference = np.asarray(z, np.float64) - np.asarray(norm.shift, np.float64)
    exact = difference * np.exp(-np.asarray(norm.log_scale, np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        assert (norms(np.asarray(back, np.float64) - exact) <= error.bound).all()
        assert (norms(back) <= error.norm).all()


@pytest.mark.parametrize("weights", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_actnorm_rounds_as_its_weights_do_in_whatever_precision_the_latents_are(x64, weights):
    rng = np.random.default_rng(1)
    norm = ActNorm(
        jnp.asarray(rng.normal(size=3), weights), jnp.asarray(rng.normal(size=3), weights)
    )
    z = jnp.asarray(rng.normal(size=(50, 3)))
    flow = Flow((norm,), (3,))
    back, info = flow.inverse((z,))
    scale, shift = (np.asarray(leaf, np.float64) for leaf in (norm.log_scale, norm.shift))
    error = norms(np.asarray(back) - (np.asarray(z) - shift) * np.exp(-scale))
    assert (error <= inverse_error_bound(flow, info, (z,))).all()


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
    _, _, flow, x = build("image-logit")
    flow = flow.with_bounds()
    latents = flow.forward(x)
    loose, strict = (FixedPointIteration(error_tolerance=tolerance) for tolerance in (1e-2, 1e-8))
    _, info = quick_jit(lambda flow, z: flow.inverse(z, loose))(flow, latents)
    assert bool(info.converged.all()) and (info.error_bound <= 1e-2 * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match=r"sample \d at scale \d, block \d cannot fall below"):
        flow.inverse(latents, strict)
    with pytest.raises(ValueError, match=r"flow\.with_bounds"):
        build("image-logit").flow.inverse(latents, loose)


def test_samples_that_are_not_finite_have_no_bound():
    _, _, flow, x = build("vector")
    flow = flow.with_bounds()
    (latents,) = flow.forward(x)
    _, _, _, bound, _ = quick_jit(invert)(flow, (latents.at[1, 0].set(jnp.nan),))
    np.testing.assert_array_equal(np.isinf(bound), [False, True, False])


def test_an_inverse_that_missed_its_tolerance_warns_and_names_the_worst():
    _, _, flow, x = build("image-logit")
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
