"""The monotone block: y = √2·w − x, where w + g(w) = √2·x; beside the table of all bijections."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bijection_cases import dense, image_residual, monotone
from cases import in_double, norms, quick_jit
from helpers import (
    contraction,
    directional_difference,
    matrix_with_eigenvalues,
    matrix_with_singular_values,
    random_like,
    rest_slow,
    sample_jacobians,
    tree_dot,
)

import iresnet_jax as ir

KEYS = jax.random.split(jax.random.key(0), 1)
HARD = ir.FixedPointIteration(1e-14, 1e-14, 50_000)


def draw(batch, *shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(batch, *shape)), float)


def linear(matrix):
    """The block of g(x) = xA."""
    operator = ir.DenseOperator(jnp.asarray(matrix, float))
    return ir.Monotone(ir.Sequential((ir.Affine(operator),)))


def steep(seed, lipschitz, dim=3):
    """A branch that nearly attains L at 0: layers of equal singular values, and a tanh."""
    rng = np.random.default_rng(seed)
    root = math.sqrt(lipschitz) * np.ones(dim)
    kernels = (matrix_with_singular_values(rng, dim, dim, root) for _ in range(2))
    first, second = (dense(kernel, rng) for kernel in kernels)
    return ir.Monotone(ir.Sequential((first, ir.Activation("tanh"), second)))


def bounded(block, shape):
    return block.bounded_by(block.certify("it", shape))


def mapped_by_hand(block, x):
    """y by the definition, in NumPy and without Anderson: w ← √2·x − g(w)."""
    w = np.sqrt(2.0) * np.asarray(x)
    for _ in range(3000):
        w = np.sqrt(2.0) * np.asarray(x) - np.asarray(block.branch(jnp.asarray(w)))
    return np.sqrt(2.0) * w - np.asarray(x), w


def test_forward_is_the_definition_and_its_jacobian_that_of_differences(x64):
    block, x = in_double(monotone(0)), draw(3, 3)
    y, w = mapped_by_hand(quick_branch(block), x)
    np.testing.assert_allclose(block.forward(x), y, atol=1e-11)
    jacobians = sample_jacobians(block.branch, jnp.asarray(w))
    expected = [(np.eye(3) - j) @ np.linalg.inv(np.eye(3) + j) for j in jacobians]
    np.testing.assert_allclose(sample_jacobians(block.forward, x), expected, atol=1e-9)
    steps = [
        (mapped_by_hand(quick_branch(block), x + 1e-5 * e)[0] - y) / 1e-5
        for e in np.eye(3)[:, None]
    ]
    np.testing.assert_allclose(np.stack(steps, axis=-1), expected, atol=1e-4)


def quick_branch(block):
    return ir.Monotone(jax.jit(block.branch))


@pytest.mark.parametrize("num_terms", rest_slow([5, 6], 6))
def test_the_series_has_the_odd_powers_alone_probe_by_probe(x64, num_terms):
    block, x = in_double(ir.Monotone(image_residual(0, (2, 2), 2, 0.9).branch)), draw(4, 2, 2, 2)
    series = ir.TruncatedSeries(num_terms)
    y, log_det = quick_jit(lambda b, x: b.forward_and_log_det(x, series, KEYS))(block, x)
    w = (x + y) / np.sqrt(2.0)
    jacobians = sample_jacobians(block.branch, w)
    keys = ir.probes.per_sample_keys(KEYS[0], 4)
    probes = ir.probes.draw_probes("rademacher", keys, x, 1)[0]()
    for term, jacobian, v in zip(log_det, jacobians, np.reshape(probes, (4, -1)), strict=True):
        powers = (np.linalg.matrix_power(jacobian, k) / k for k in range(1, num_terms + 1, 2))
        np.testing.assert_allclose(term, -2.0 * sum(v @ p @ v for p in powers), rtol=1e-8)


@pytest.mark.parametrize(
    "estimator",
    [ir.Roulette(0.9, lipschitz=0.7), ir.BoundedSeries(1e-3), ir.TruncatedSeries(40)],
    ids=lambda estimator: type(estimator).__name__,
)
def test_the_mean_over_probes_is_the_log_determinant(estimator):
    block, x = bounded(monotone(1), (3,)), draw(4, 3)
    exact = quick_jit(lambda x: block.forward_and_log_det(x, ir.Exact())[1])(x)
    evaluate = lambda key: block.forward_and_log_det(x, estimator, key[None])[1]  # noqa: E731
    draws = quick_jit(jax.vmap(evaluate))(jax.random.split(jax.random.key(1), 600))
    stderr = np.std(draws, axis=0, ddof=1) / math.sqrt(600)
    bias = block.certify("it", (3,)).bias_bound(estimator)
    assert bias <= 3e-3
    assert np.all(np.abs(np.mean(draws, axis=0) - exact) <= 5.0 * stderr + bias)


@pytest.mark.parametrize("lipschitz", [0.1, 0.95])
@pytest.mark.parametrize("num_terms", [2, 5])
def test_the_bias_is_within_its_bound_which_counts_the_branch_twice(x64, lipschitz, num_terms):
    """Of g(x) = Lx on the line, where a probe's series is the truth: no noise."""
    block, series = linear([[lipschitz]]), ir.TruncatedSeries(num_terms)
    log_det = block.forward_and_log_det(draw(2, 1), series, KEYS)[1]
    bias = np.abs(log_det - (np.log1p(-lipschitz) - np.log1p(lipschitz)))
    certificate = block.certify("it", (1,))
    assert np.all(bias <= certificate.bias_bound(series))
    (branch,) = certificate.branches
    once = series.bias_bound(branch.lipschitz, 1)
    assert certificate.bias_bound(series) == pytest.approx(2.0 * once)
    if lipschitz == 0.1 and num_terms % 2 == 0:
        assert np.all(bias > once)


def test_gradients_are_those_of_finite_differences(x64):
    block, x = in_double(steep(2, 0.9)), draw(4, 3)
    weights = draw(4, 3, seed=1)

    @jax.jit
    def value(at):
        block, x = at
        y, log_det = block.forward_and_log_det(x, ir.Exact())
        return jnp.sum(weights * y**2) + jnp.sum(log_det**2)

    direction = random_like(3, (block, x))
    slope = tree_dot(jax.grad(value)((block, x)), direction)
    assert slope == pytest.approx(directional_difference(value, (block, x), direction), rel=1e-6)


def test_the_series_gradient_is_that_of_the_series(x64):
    """On the line a probe's Neumann gradient is exact."""
    block, x, series = in_double(steep(2, 0.8, dim=1)), draw(4, 1), ir.TruncatedSeries(7)
    value = jax.jit(lambda at: jnp.sum(at[0].forward_and_log_det(at[1], series, KEYS)[1]))
    direction = random_like(3, (block, x))
    slope = tree_dot(jax.grad(value)((block, x)), direction)
    assert slope == pytest.approx(directional_difference(value, (block, x), direction), rel=1e-6)


@pytest.mark.parametrize("lipschitz", [0.5, 0.97, 0.999])
def test_the_certificate_is_attained(x64, lipschitz):
    """By a linear branch with the eigenvalues L and −L."""
    matrix = matrix_with_eigenvalues(0, [lipschitz, -lipschitz, 0.1])
    block = dataclasses.replace(linear(matrix), solver=HARD)
    certificate = block.certify("it", (3,))
    slopes = np.linalg.svd(sample_jacobians(block.forward, draw(1, 3)), compute_uv=False)
    sharp = (1.0 + lipschitz) / (1.0 - lipschitz)
    for largest, stated in ((slopes.max(), "forward"), (1.0 / slopes.min(), "inverse")):
        assert largest <= getattr(certificate, stated) * (1.0 + 1e-9)
        assert largest == pytest.approx(sharp, rel=1e-7)
        assert getattr(certificate, stated) == pytest.approx(sharp, rel=1e-5)


@pytest.mark.parametrize(
    ("lipschitz", "scale"),
    [
        *((0.5, 1e-3), (0.99, 1e3)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.5, 1e3), (0.99, 1e-3))),
    ],
)
def test_errors_are_within_their_bounds_both_ways(lipschitz, scale):
    """In single precision, against double; and forward converges for inputs of any size."""
    block, x = bounded(steep(4, lipschitz), (3,)), draw(64, 3, scale=scale)
    y, forward = quick_jit(lambda b, x: b.forward_with_report(x))(block, x)
    assert bool(forward.converged.all())
    np.testing.assert_array_equal(y, quick_jit(lambda b, x: b.forward(x))(block, x))
    backs = []
    for tolerance in (1e-2, 1e-6):
        solver = ir.FixedPointIteration(tolerance, tolerance, 5000)
        backs.append(quick_jit(lambda b, y, s=solver: b.inverse(y, s))(block, y))
        assert bool(backs[-1][1].converged.all())
    with jax.enable_x64(True):
        both = quick_jit(lambda b, x, y: (b.forward(x), b.inverse(y, HARD)))
        image, (preimage, info) = both(in_double(block), in_double(x), in_double(y))
        assert np.all(norms(y - np.asarray(image)) <= forward.error_bound)
        assert bool(info.converged.all())
    for back, info in backs:
        distance = norms(back - np.asarray(preimage))
        assert np.all(distance <= info.error_bound[0])
        assert np.all(info.residual[0] >= 0.0) and info.residual.shape == (1, 64)
    floor = backs[-1][1].rounding[0] / (1.0 - lipschitz)
    assert np.all(floor <= 1e-3 * (1.0 + norms(x) + norms(y)))


def test_an_error_tolerance_is_met_or_refused():
    block, x = bounded(monotone(1), (3,)), draw(8, 3)
    y = block.forward(x)
    back, info = block.inverse(y, ir.Anderson(error_tolerance=1e-4))
    assert bool(info.converged.all()) and float(info.error_bound.max()) <= 1e-4
    assert norms(back - x).max() <= 2e-4
    _, info = block.inverse(y, ir.Anderson(error_tolerance=1e-8))
    assert not bool(info.converged.any())
    silent = ir.Monotone(contraction(0, 3, 0.5), jnp.float32(0.5))
    with pytest.raises(ValueError, match="Contraction is not known"):
        silent.inverse(y, ir.Anderson(error_tolerance=1e-4))
    assert bool(jnp.isinf(silent.inverse(y)[1].error_bound).all())


def test_a_branch_that_states_its_own_rounding_is_bounded():
    inner = monotone(1).branch

    class Own:
        rounding_bound = staticmethod(inner.rounding_bound)
        __call__ = staticmethod(inner.__call__)

    y = draw(8, 3)
    error_bound = ir.Monotone(Own(), jnp.float32(0.7)).inverse(y)[1].error_bound
    known = ir.Monotone(inner, jnp.float32(0.7)).inverse(y)[1].error_bound
    np.testing.assert_allclose(error_bound, known, rtol=0.5)


def test_a_subclass_of_sequential_is_bounded_by_its_own_rounding():
    inner = monotone(1).branch

    class Coarse(ir.Sequential):
        def __call__(self, x):
            return super().__call__(x).astype(jnp.bfloat16).astype(x.dtype)

        def lipschitz_bound(self):
            return super().lipschitz_bound()

        def rounding_bound(self, x):
            size = jnp.sqrt(jnp.sum(inner(x) ** 2, axis=1))
            return super().rounding_bound(x) + 2.0**-8 * (size + 1e-3)

    y, lipschitz = draw(8, 3), jnp.float32(0.7)
    coarse = ir.Monotone(Coarse(inner.stages), lipschitz).inverse(y)[1].rounding
    assert (coarse > 10.0 * ir.Monotone(inner, lipschitz).inverse(y)[1].rounding).all()


def test_a_forward_solve_that_misses_is_nan_with_its_derivatives_and_others_are_not():
    few = ir.FixedPointIteration(max_steps=4)
    block = ir.Monotone(lambda w: 0.9 * jnp.tanh(w), solver=few)
    x = jnp.array([[50.0, -60.0], [0.4, 0.3]])  # the first sees constants
    y, log_det = block.forward_and_log_det(x, ir.Exact())
    assert np.isfinite(y[0]).all() and np.isfinite(log_det[0])
    assert np.isnan(y[1]).all() and np.isnan(log_det[1])
    assert np.isnan(block.forward(x)[1]).all()
    result, info = block.forward_with_report(x)
    assert list(info.converged) == [True, False] and np.isfinite(result).all()
    gradient = jax.grad(lambda x: block.forward_and_log_det(x, ir.Exact())[0][:, 0].sum())(x)
    assert np.isfinite(gradient[0]).all() and np.isnan(gradient[1]).all()
    _, missed = block.inverse(x, few)
    assert list(missed.converged[0]) == [True, False]


def test_a_branch_that_does_not_contract_is_not_certified():
    certificate = linear(1.1 * np.eye(2)).certify("it", (2,))
    assert not certificate.certified
    assert math.isinf(certificate.forward) and math.isinf(certificate.inverse)
    broken = linear(np.full((2, 2), np.nan)).certify("it", (2,))
    assert "not finite" in broken.failures[0].problem and math.isinf(broken.forward)


def test_what_is_no_block_is_refused():
    branch = monotone(1).branch
    with pytest.raises(TypeError, match="must be a Solver"):
        ir.Monotone(branch, solver="anderson")
    coarse = ir.nn.Stack(ir.nn.Monotone(ir.nn.dense_branch(3, (4,), precision="bfloat16")), 2)
    with pytest.raises(ValueError, match=r"bfloat16 can meet no rtol below 0\.0078"):
        coarse.init(jax.random.key(0), draw(2, 3))
    with pytest.raises(ValueError, match="must keep the shape"):
        ir.Monotone(lambda x: x[:, :1]).forward(draw(2, 3))
    with pytest.raises(ValueError, match="Keys are needed for 1"):
        monotone(1).forward_and_log_det(draw(2, 3), ir.TruncatedSeries(2), jnp.repeat(KEYS, 2))
    with pytest.raises(TypeError, match="floating point"):
        monotone(1).forward(jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="other weights"):
        monotone(1).bounded_by(monotone(2).certify("it", (3,)))
    nested = ir.nn.Stack(ir.nn.Monotone(ir.nn.Monotone(ir.nn.dense_branch(3, (4,)))), 2)
    with pytest.raises(TypeError, match="Monotone is a block"):
        nested.init(jax.random.key(0), draw(2, 3))


def monotone_block(dim, features, **options):
    """As a model's ``make_branch``."""
    return ir.nn.Monotone(ir.nn.dense_branch(dim, features, **options), parent=None)


@pytest.fixture(scope="module")
def model():
    return ir.nn.VectorFlow(dim=3, depth=2, features=(8,), coeff=0.9, make_branch=monotone_block)


@pytest.fixture(scope="module")
def variables(model):
    return ir.nn.shrink(model, jax.jit(model.init)(jax.random.key(1), draw(16, 3)))


@pytest.mark.slow
def test_a_flow_of_monotone_blocks(model, variables):
    x = draw(16, 3)
    certificate = ir.certify(model, variables)
    assert certificate.certified and [len(b.layers) for b in certificate.blocks] == [2, 2]
    flow = model.flow(variables).with_bounds(certificate)
    assert flow.contracts
    (latents,) = jax.jit(flow.forward)(x)
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x)
    expected = flow.prior_log_prob((latents,)) + np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(jax.jit(flow.log_prob)(x), expected, atol=1e-4)
    slopes = np.linalg.svd(jacobians, compute_uv=False)
    assert slopes.max() <= certificate.forward and 1.0 / slopes.min() <= certificate.inverse
    back, info = quick_jit(lambda z: flow.inverse(z))((latents,))
    assert info.residual.shape == (2, 16) and flow.solve_names()[1] == "scale 0, block 1"
    bound = ir.inverse_error_bound(flow, info)
    double = ir.inverse_error_in_double(flow, back, (latents,))
    assert np.isfinite(bound).all() and np.all(double <= bound)
    assert norms(back - x).max() <= 1e-3
    samples, drawn = quick_jit(lambda key: flow.sample(key, 8))(jax.random.key(0))
    assert samples.shape == (8, 3) and bool(drawn.converged.all())


@pytest.mark.slow
def test_training_steps_lower_the_loss(model, variables):
    x, optimizer = 0.5 + draw(16, 3) ** 2, optax.adam(1e-2)
    series = ir.TruncatedSeries(10)

    @jax.jit
    def step(variables, opt_state, key):
        loss = lambda flow: -flow.log_prob(x, series, key=key).mean()  # noqa: E731
        value, grads, state = ir.nn.value_and_grad(model, loss, variables)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (
            {**state, "params": optax.apply_updates(variables["params"], updates)},
            opt_state,
            value,
        )

    trained, values, opt_state = variables, [], optimizer.init(variables["params"])
    for key in jax.random.split(jax.random.key(2), 20):
        trained, opt_state, value = step(trained, opt_state, key)
        values.append(float(value))
    assert np.isfinite(values).all() and np.mean(values[-3:]) < np.mean(values[:3])


@pytest.mark.slow
def test_a_stack_maps_images_and_recomputes_in_the_backward_pass():
    branch = ir.nn.bottleneck_branch(2, 3, coeff=0.8)
    module = ir.nn.Stack(ir.nn.Monotone(branch), 2, remat=True)
    x = draw(3, 4, 4, 2)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    y = jax.jit(module.apply)(variables, x)
    back, info = jax.jit(lambda v, y: module.apply(v, y, method="inverse"))(variables, y)
    assert bool(info.converged.all())
    np.testing.assert_allclose(back, x, atol=1e-3)
