"""What holds for every flow, whatever its layers: each property for each model of the table."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    BATCH,
    DENSITIES,
    EXACT,
    MODELS,
    actnorm_of,
    build,
    each_of,
    evaluate,
    links_of,
    norms,
    quick_jit,
    residual_of,
    walk,
)
from helpers import rest_slow

from iresnet_jax import (
    FixedPointIteration,
    Logit,
    TruncatedSeries,
    certify,
    logit,
    truncation_error_bound,
)

KEY = jax.random.key(7)
ALPHA = inspect.signature(logit).parameters["alpha"].default

every_model, every_density = each_of(MODELS), each_of(DENSITIES)

#: One of each kind, for what takes a compilation of its own.
SOME = ["vector", "image", "image-logit", "image-odd-channels-leave"]

# Compiled once for every kind of flow, and shared by the tests.
forward = quick_jit(lambda flow, x: flow.forward(x))
invert = quick_jit(lambda flow, latents: flow.inverse(latents))
TWO_STEPS = FixedPointIteration(max_steps=2)
invert_in_two_steps = quick_jit(lambda flow, latents: flow.inverse(latents, TWO_STEPS))
sample = quick_jit(lambda flow, key, temperature: flow.sample(key, 5, temperature=temperature))
exact_log_prob = quick_jit(lambda flow, x: flow.log_prob(x, EXACT))


@quick_jit
def branch_jacobians(branch, points):
    return jax.vmap(jax.jacrev(lambda h: branch(h[None])[0]))(points)


def blocks_of(flow):
    return list(flow.blocks())


@functools.cache
def branches_of(name):
    """What is proved of every branch of a network, with its dimensions."""
    return certify(build(name).flow).branches


def bounds_of(name):
    return [branch.lipschitz for branch in branches_of(name)]


def shapes_of(name):
    """The shape that every branch sees, without batch axis."""
    inputs = jax.eval_shape(lambda flow, x: walk(flow, x).inputs, build(name).flow, build(name).x)
    return [h.shape[1:] for h in inputs]


# Volume and inverse


@pytest.mark.parametrize("name", rest_slow(MODELS, "vector", "image-odd-channels-leave"))
def test_exact_log_det_is_that_of_the_full_jacobian(name):
    """From data to latents, the domain's transform and ActNorm included; float64."""
    result = evaluate(name)
    np.testing.assert_allclose(result.log_det, result.jacobian_log_det, rtol=1e-10, atol=1e-10)


@every_model
def test_forward_gives_the_latents_of_forward_and_log_det(name):
    result, flow = evaluate(name), build(name).flow
    assert [z.shape for z in result.latents] == [(BATCH, *s) for s in flow.latent_shapes()]
    for a, b in zip(result.latents, result.forward_latents, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@every_model
def test_latents_have_the_dimensions_of_the_data(name):
    flow = build(name).flow
    assert sum(np.prod(shape) for shape in flow.latent_shapes()) == flow.dim
    assert flow.dim == np.prod(flow.event_shape)
    branches = branches_of(name)
    assert len(branches) == len(blocks_of(flow)) == len(flow.solve_names())
    assert [branch.dim for branch in branches] == [np.prod(shape) for shape in shapes_of(name)]


def propagated_error(flow, bounds, residuals) -> np.ndarray:
    """Largest ‖x − x*‖₂ that the blocks' residuals [blocks, batch] allow, in exact arithmetic.

    Block by block from the last, for an error e in the block's output and a residual r:
    ‖h − h*‖ ≤ (e + r)/(1 − L); ActNorm's inverse multiplies by at most max exp(−log_scale).
    Squeezes and splits keep norms; the logit's inverse has slope ≤ 1/4/(1 − 2α).
    """
    error = np.zeros(residuals.shape[1])
    blocks = zip(blocks_of(flow), bounds, residuals, strict=True)
    for block, lipschitz, residual in reversed(list(blocks)):
        assert lipschitz < 1
        error = (error + residual) / (1.0 - lipschitz)
        if (norm := actnorm_of(block)) is not None:
            error = error * np.exp(-np.min(np.asarray(norm.log_scale, np.float64)))
    in_logits = isinstance(links_of(flow.levels[0])[0], Logit)
    return error * (0.25 / (1.0 - 2.0 * ALPHA) if in_logits else 1.0)


@every_model
def test_the_inverse_is_as_close_as_the_rigorous_bounds_say(name):
    result, (_, _, flow, x) = evaluate(name), build(name)
    assert result.info.converged.all()
    assert result.info.residual.shape == (len(blocks_of(flow)), BATCH)
    bound = propagated_error(flow, bounds_of(name), result.info.residual)
    assert np.all(norms(result.reconstruction - np.asarray(x)) <= bound + 1e-12)
    assert np.all(bound < 1e-3)


@pytest.mark.parametrize("name", rest_slow(["vector", "image"], "vector"))
def test_blocks_carry_their_bound_into_the_inverse(name):
    _, _, flow, x = build(name)
    bounds = bounds_of(name)
    bounded = flow.with_bounds()
    stored = [float(residual_of(block).lipschitz) for block in bounded.blocks()]
    assert all(
        bound <= kept <= bound * (1 + 1e-6) for bound, kept in zip(bounds, stored, strict=True)
    )
    _, info = invert(bounded, forward(bounded, x))
    total = np.asarray(info.residual + info.rounding)
    expected = total / (1.0 - np.asarray(stored))[:, None]
    np.testing.assert_allclose(info.error_bound, expected, rtol=1e-5)


@every_model
def test_bounds_hold_for_the_branches_jacobians(name):
    """‖J_g‖ at random points never exceeds L, nor comes near 0 (the bound is not vacuous)."""
    flow = build(name).flow
    rows = zip(blocks_of(flow), bounds_of(name), shapes_of(name), strict=True)
    for block, bound, shape in rows:
        points = jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32)
        size = int(np.prod(shape))
        jacobians = np.asarray(branch_jacobians(residual_of(block).branch, points))
        matrices = jacobians.reshape(4, size, size)
        measured = np.linalg.norm(matrices, 2, axis=(1, 2)).max()
        assert 0.05 * bound <= measured <= bound * (1 + 1e-5)


def test_unconverged_inverses_say_so():
    _, _, flow, x = build("vector")
    _, info = invert_in_two_steps(flow, forward(flow, x))
    assert not info.converged.any()
    assert (info.num_steps == 2).all()


# Sampling


@pytest.mark.parametrize(
    "name", rest_slow([*SOME, "image-without-factor-out"], "vector", "image-logit")
)
def test_samples(name):
    flow = build(name).flow
    x, info = sample(flow, KEY, 1.0)
    assert x.shape == (5, *flow.event_shape)
    assert info.converged.all() and info.converged.shape == (len(blocks_of(flow)), 5)
    assert jnp.isfinite(x).all()
    if not flow.levels[0].takes_unit_interval:  # others may leave [0, 1], which forward() refuses
        for z, prior in zip(flow.forward(x), flow.priors, strict=True):
            assert np.all(np.abs(z - prior.mean) <= 6.0 * np.exp(prior.log_std))


def test_samples_without_temperature_are_the_mode_of_the_prior():
    flow = build("vector").flow
    x, _ = sample(flow, KEY, 0.0)
    np.testing.assert_allclose(x, jnp.broadcast_to(x[:1], x.shape))
    np.testing.assert_allclose(forward(flow, x)[0][0], flow.priors[0].mean, atol=1e-5)


# Jit, batches, noise


@pytest.mark.parametrize("name", rest_slow(["vector", "image-logit"], "vector"))
def test_jitted_equals_unjitted(name):
    _, _, flow, x = build(name)
    estimator = TruncatedSeries(2)

    def both(flow, x, key):
        return flow.log_prob(x, estimator, key=key), flow.inverse(flow.forward(x))

    plain, jitted = both(flow, x, KEY), quick_jit(both)(flow, x, KEY)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", rest_slow(["vector", "image-logit"], "image-logit"))
def test_a_batch_gives_what_its_samples_give_one_by_one(name):
    _, _, flow, x = build(name)
    estimator = TruncatedSeries(3, num_probes=2, probe="gaussian")
    keys = jax.random.split(KEY, len(x))

    @quick_jit
    def run(flow, x, keys):
        latents, log_det = flow.forward_and_log_det(x, estimator, key=keys)
        back, info = flow.inverse(latents)
        return latents, log_det, back, info.num_steps.T, info.converged.T

    together = run(flow, x, keys)
    alone = [run(flow, x[i : i + 1], keys[i : i + 1]) for i in range(len(x))]
    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *alone)
    for a, b in zip(jax.tree.leaves(together[:3]), jax.tree.leaves(stacked[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.abs(together[3] - stacked[3]).max() <= 1  # rounding may shift the last step
    assert together[4].all() and stacked[4].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_latent_does_not_spoil_the_others(bad):
    _, _, flow, x = build("vector")
    (z,) = forward(flow, x)
    clean, _ = invert(flow, (z,))
    spoiled, info = invert(flow, (z.at[1].set(bad),))
    np.testing.assert_array_equal(spoiled[0], clean[0])
    np.testing.assert_array_equal(spoiled[2], clean[2])
    assert info.converged[:, [0, 2]].all()
    if not np.isfinite(bad):
        assert not info.converged[:, 1].any()


def test_one_key_stands_for_a_key_a_sample_by_its_index():
    _, _, flow, x = build("vector")
    run = quick_jit(lambda flow, x, key: flow.log_prob(x, TruncatedSeries(2), key=key))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(len(x)))
    from_one, from_many = run(flow, x, KEY), run(flow, x, keys)
    np.testing.assert_array_equal(from_one, from_many)


def test_raw_keys_are_as_good_as_typed_ones():
    _, _, flow, x = build("vector")
    run = quick_jit(lambda flow, x, key: flow.log_prob(x, TruncatedSeries(2), key=key))
    np.testing.assert_array_equal(run(flow, x, KEY), run(flow, x, jax.random.key_data(KEY)))
    keys = jax.random.split(KEY, len(x))
    np.testing.assert_array_equal(run(flow, x, keys), run(flow, x, jax.random.key_data(keys)))


def test_half_precision_data_are_computed_in_single():
    _, _, flow, x = build("vector")
    (z,) = forward(flow, x.astype(jnp.float16))
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, forward(flow, x)[0], atol=1e-2)
    assert invert(flow, (z.astype(jnp.bfloat16),))[0].dtype == jnp.float32


def test_every_block_draws_noise_of_its_own():
    """Probes handed to the estimator differ between blocks, scales and samples."""
    _, _, flow, x = build("image-odd-channels-leave")
    seen = []

    def recording(branch, x, key, lipschitz):
        jax.debug.callback(seen.append, jax.random.key_data(key))
        return branch(x), jnp.zeros(len(x))

    jax.block_until_ready(flow.forward_and_log_det(x, recording, key=KEY))
    jax.effects_barrier()
    bits = np.concatenate(seen)
    assert len(seen) == len(blocks_of(flow))
    assert len(np.unique(bits, axis=0)) == len(bits) == len(seen) * BATCH


# Densities


@every_density
def test_log_prob_is_the_change_of_variables(name):
    result, flow = evaluate(name), build(name).flow
    expected = np.zeros(BATCH)
    for z, prior in zip(result.latents, flow.priors, strict=True):
        mean, log_std = (np.asarray(a, np.float64) for a in (prior.mean, prior.log_std))
        terms = -0.5 * ((z - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        expected += terms.reshape(BATCH, -1).sum(1)
    expected += result.jacobian_log_det
    log_prob = exact_log_prob(flow, build(name).x)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-4)


@each_of(["vector-depth-1", "vector-tanh", "vector-lipswish", "vector-without-actnorm"])
def test_densities_integrate_to_one(name):
    """Riemann sum over a plane that holds all but a negligible part of the mass."""
    flow, side, step = build(name).flow, 10.0, 0.05
    ticks = np.arange(-side, side, step)
    grid = jnp.asarray(np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2), jnp.float32)
    density = jnp.exp(exact_log_prob(flow, grid))
    assert float(jnp.sum(density)) * step**2 == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("name", "num_terms"),
    [
        *(("vector", 1), ("vector", 4), ("image-logit", 3)),
        pytest.param("image", 3, marks=pytest.mark.slow),
    ],
)
def test_the_series_averages_to_the_exact_log_prob(name, num_terms):
    """Within four standard errors and the truncation bounds of all blocks."""
    _, _, flow, x = build(name)
    repeats = 1000
    estimator = TruncatedSeries(num_terms)
    many = jnp.repeat(x[:1], repeats, axis=0)
    run = quick_jit(lambda flow, x, key: flow.log_prob(x, estimator, key=key))
    draws = np.asarray(run(flow, many, jax.random.key(num_terms)), np.float64)
    error = draws.std() / np.sqrt(repeats)
    bound = sum(
        float(truncation_error_bound(branch.lipschitz, branch.dim, num_terms))
        for branch in branches_of(name)
    )
    target = float(exact_log_prob(flow, x)[0])
    rounding = 1e-5 * abs(target)
    assert abs(draws.mean() - target) <= 4 * error + bound + rounding
    assert draws.std() > 0


def test_many_terms_leave_no_bias():
    """With 60 terms the truncation bound is negligible: the standard error alone decides."""
    _, _, flow, x = build("vector")
    branches = branches_of("vector")
    assert sum(float(truncation_error_bound(b.lipschitz, b.dim, 60)) for b in branches) < 1e-6
    many = jnp.repeat(x[:1], 4000, axis=0)
    run = quick_jit(lambda flow, x, key: flow.log_prob(x, TruncatedSeries(60), key=key))
    draws = np.asarray(run(flow, many, KEY), np.float64)
    target = float(exact_log_prob(flow, x)[0])
    error = draws.std() / np.sqrt(len(draws))
    assert 0 < error < 0.01
    assert abs(draws.mean() - target) <= 4 * error + 1e-5
