"""The invertible 1×1 convolution against dense float64 linear algebra; as an option of models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import in_double, norms, quick_jit
from helpers import matrix_with_singular_values, rest_slow, sample_jacobians

import iresnet_jax as ir

RNG = np.random.default_rng


def rotation(size, seed=0):
    return np.linalg.qr(RNG(seed).normal(size=(size, size)))[0]


def wilkinson(size):
    """Elimination with partial pivoting lets an entry grow to 2^(size − 1)."""
    matrix = np.eye(size) - np.tril(np.ones((size, size)), -1)
    matrix[:, -1] = 1.0
    return matrix


#: Well and badly conditioned, of extreme scale, triangular, and those that elimination hates.
MATRICES = {
    "rotation": rotation(5),
    "large rotation": rotation(64),
    "one channel": np.array([[-3.0]]),
    "swap": np.array([[0.0, 1.0], [1.0, 0.0]]),
    "condition 1e3": matrix_with_singular_values(RNG(1), 6, 6, np.geomspace(1, 1e-3, 6)),
    "condition 1e5": matrix_with_singular_values(RNG(1), 6, 6, np.geomspace(1, 1e-5, 6)),
    "huge": 1e30 * rotation(4),
    "tiny": 1e-30 * rotation(4),
    "scales": np.diag([1e-4, 1.0, 1e4]) @ rotation(3),
    "triangular": np.triu(np.ones((30, 30))),
    "Wilkinson's": wilkinson(40),
    "Hilbert's": 1.0 / (np.arange(5)[:, None] + np.arange(5) + 1.0),
}
REGULAR = list(MATRICES)


def mixing(name):
    return ir.Invertible1x1(jnp.asarray(MATRICES[name], jnp.float32))


def bounded(layer):
    return layer.with_bounds(iter(()))


def exact(layer):
    return np.asarray(layer.kernel, np.float64)


@pytest.mark.parametrize("name", REGULAR)
def test_the_certificate_holds_the_extreme_singular_values_and_is_sharp(name):
    layer = mixing(name)
    certificate = layer.certify("it", (2, 2, layer.kernel.shape[0]))
    values = np.linalg.svd(exact(layer), compute_uv=False)
    assert certificate.certified
    assert values[0] <= certificate.forward * (1 + 1e-15)
    assert 1.0 / values[-1] <= certificate.inverse * (1 + 1e-9)  # of the decomposition
    np.testing.assert_allclose(certificate.forward, values[0], rtol=1e-9)
    np.testing.assert_allclose(certificate.inverse, 1.0 / values[-1], rtol=1e-6)


@pytest.mark.parametrize("exponent", [-13, -10, -5, 0])
def test_the_smallest_singular_value_is_bounded_from_below_up_to_the_limits_of_float64(exponent):
    """Of [[1, 1], [1, 1 + t]], whose inverse is [[1 + t, −1], [−1, 1]]/t exactly."""
    t = 2.0 ** round(exponent / math.log10(2))
    true = np.linalg.norm(np.array([[1 + t, -1], [-1, 1]]), 2) / t
    bound = ir.inverse_upper_bound(np.array([[1.0, 1.0], [1.0, 1.0 + t]]))
    assert true * (1 - 1e-14) <= bound <= 2 * true


SINGULAR = {
    "zero": np.zeros((3, 3)),
    "rank 2": np.outer([1, 2, 3], [1, 0, 1.0]) + np.outer([0, 1, 1], [1, 1, 0.0]),
    "below what float64 tells": np.array([[1.0, 1.0], [1.0, np.nextafter(1.0, 2.0)]]),
    "overflowing": np.diag([1.0, 1e-320]),
    "NaN": np.diag([1.0, math.nan]),
    "infinite": np.diag([1.0, math.inf]),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_what_is_not_proved_to_be_regular_is_not_certified(name, x64):
    layer = ir.Invertible1x1(jnp.asarray(SINGULAR[name]))
    certificate = layer.certify("scale 0, block 1", (layer.kernel.shape[0],))
    assert not certificate.certified and math.isinf(certificate.inverse)
    (problem,) = certificate.problems
    reason = "not finite: " if name in ("NaN", "infinite") else "not proved to be regular"
    assert reason in problem and "Invertible1x1 in scale 0, block 1" in problem
    assert math.isinf(ir.inverse_upper_bound(np.asarray(SINGULAR[name])))
    nothing = ir.Error(jnp.zeros(2), jnp.ones(2))
    error = bounded(layer).inverse_error(nothing, None, layer.kernel.shape[:1])
    assert bool(jnp.isinf(error.bound).all())


@pytest.mark.parametrize("shape", rest_slow([(), (3, 2)], (3, 2)))
def test_log_det_is_that_of_the_full_jacobian(x64, shape):
    for name in ("rotation", "condition 1e3", "one channel", "scales"):
        layer = in_double(mixing(name))
        x = jnp.asarray(RNG(0).normal(size=(3, *shape, layer.kernel.shape[0])))
        y, log_det = layer.forward_and_log_det(x)
        jacobians = sample_jacobians(layer.forward, x).reshape(3, x[0].size, -1)
        np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], atol=1e-9)
        np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(layer.kernel), rtol=1e-9)
        np.testing.assert_allclose(layer.backward(y), x, atol=1e-8)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_log_dets_of_large_and_small_weights_are_finite(size, channels):
    layer = ir.Invertible1x1(jnp.asarray(size * rotation(channels), jnp.float32))
    _, log_det = layer.forward_and_log_det(jnp.ones((2, channels)))
    np.testing.assert_allclose(log_det, channels * np.log(size), rtol=1e-5)


def hostile(rng, layer, shape, size):
    """Inputs along both extreme singular vectors, of mixed scales, and plain ones."""
    left, _, right = np.linalg.svd(exact(layer))
    plain = rng.normal(size=(4, *shape, len(left)))
    scaled = plain * np.geomspace(1e-6, 1e6, len(left))
    ends = [np.broadcast_to(v, plain[0].shape) for v in (left[:, 0], left[:, -1], right[0])]
    return size * np.concatenate([plain, scaled, ends])


@functools.partial(quick_jit, static_argnums=3)
def inverted(layer, y, error, shape):
    return layer.inverse_error(error, None, shape), layer.backward(y)


@pytest.mark.parametrize(
    "name",
    rest_slow(
        [n for n in REGULAR if n != "Wilkinson's"],
        *("one channel", "condition 1e3", "condition 1e5", "huge", "tiny", "scales", "Hilbert's"),
    ),
)
def test_the_error_of_the_inverse_is_within_its_bound(name):
    """Of exact outputs in single precision, and of outputs that are off by 1e-4 besides."""
    layer, rng = bounded(mixing(name)), RNG(2)
    for shape, size in [((), 1e-25), ((2, 1), 1e6)]:
        x = np.tile(hostile(rng, layer, shape, size), (2, *[1] * (len(shape) + 1)))
        y = x @ exact(layer)
        off = np.repeat([0.0, 1e-4], len(y) // 2) * norms(y)
        noise = rng.normal(size=y.shape) * off.reshape(-1, *[1] * (y.ndim - 1))
        with np.errstate(over="ignore", under="ignore"):
            given = (y + noise).astype(np.float32)
        if not np.isfinite(given).all():
            continue
        distance = np.nextafter(norms(given - y).astype(np.float32), np.float32(np.inf))
        size = np.nextafter(norms(given).astype(np.float32), np.float32(np.inf))
        error, back = inverted(layer, given, ir.Error(distance, size), x.shape[1:])
        back = np.asarray(back, np.float64)
        assert (norms(back - x) <= error.bound).all()
        assert (norms(back) <= error.norm).all()


@pytest.mark.parametrize(
    "name",
    rest_slow(["rotation", "large rotation", "condition 1e3", "huge"], "condition 1e3", "huge"),
)
def test_the_bound_is_useful(name):
    layer = bounded(mixing(name))
    inverse = layer.certify("", layer.kernel.shape[:1]).inverse
    size = np.float32(1.0)
    error = layer.inverse_error(ir.Error(jnp.zeros(1), jnp.full(1, size)), None, (9, 64))
    assert float(error.bound[0]) <= 2e-3 * inverse
    moved = layer.inverse_error(ir.Error(jnp.ones(1), jnp.zeros(1)), None, (9, 64))
    assert inverse <= float(moved.bound[0]) <= 1.02 * inverse


def test_in_double_the_rough_inverse_is_refined(x64):
    layer = bounded(mixing("condition 1e3"))
    double = in_double(layer)
    x = jnp.asarray(RNG(0).normal(size=(5, 6)))
    y = x @ double.kernel
    error = ir.Error(jnp.zeros(5), jnp.asarray(norms(y)) * (1 + 1e-15))
    bound = double.inverse_error(error, None, (6,)).bound
    assert (norms(np.asarray(double.backward(y)) - np.asarray(x)) <= bound).all()
    assert float(bound.max()) <= 1e-8


def test_without_bounds_none_is_stated_and_wrong_sizes_are_refused():
    layer, error = mixing("rotation"), ir.Error(jnp.zeros(2), jnp.ones(2))
    assert bool(jnp.isinf(layer.inverse_error(error, None, (5,)).bound).all())
    for call in (layer.forward, layer.backward):
        with pytest.raises(ValueError, match=r"kernel \(5, 5\) cannot act .* shape \(2, 4\)"):
            call(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"kernel \(5, 4\) cannot act"):
        ir.Invertible1x1(jnp.ones((5, 4))).forward(jnp.ones((2, 5)))
    with pytest.raises(ValueError, match="cannot act"):
        layer.certify("it", (3, 3, 4))


# As an option of models


@pytest.fixture(scope="module")
def model():
    return ir.nn.VectorFlow(dim=3, depth=2, features=(6,), mixing=True)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (32, 3)) * jnp.asarray([1.0, 5.0, 0.1])


@pytest.fixture(scope="module")
def variables(model, x):
    return jax.jit(model.init)(jax.random.key(1), x)


def test_it_starts_from_rotations_that_differ(variables):
    kernels = np.asarray(variables["params"]["scale0_blocks"]["mixing"])
    for kernel in kernels:
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(3), atol=1e-6)
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2


def test_actnorm_is_initialised_behind_it(model, variables, x):
    """Every block's branch sees a rotation of data of mean 0 and deviation 1."""
    for block in quick_jit(model.flow)(variables).blocks():
        norm, turn, _ = block.links
        normal = np.asarray(norm.forward(x))
        np.testing.assert_allclose(normal.mean(0), 0.0, atol=1e-5)
        np.testing.assert_allclose(normal.std(0), 1.0, rtol=1e-3)
        assert isinstance(turn, ir.Invertible1x1)
        x = block.forward(x)


@pytest.mark.slow
def test_a_model_with_it_is_certified_inverted_and_trained(model, variables, x):
    flow = model.flow(variables).with_bounds()
    certificate = ir.certify(model, variables)
    assert certificate.certified
    solver = ir.Anderson(error_tolerance=1e-4)
    latents = quick_jit(lambda x: flow.forward(x))(x)
    back, info = quick_jit(lambda z: flow.inverse(z, solver))(latents)
    bound = ir.inverse_error_bound(flow, info, latents)
    double = ir.inverse_error_in_double(flow, back, latents)
    assert np.isfinite(bound).all() and np.all(double <= bound) and double.max() < 1e-2
    assert np.all(norms(np.asarray(back - x)) <= double + 1e-3)
    jacobians = sample_jacobians(lambda x: flow.forward(x)[0], x[:4])
    log_det = quick_jit(lambda x: flow.forward_and_log_det(x)[1])(x[:4])
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], atol=1e-4)
    loss = lambda flow: -flow.log_prob(x).mean()  # noqa: E731
    evaluate = quick_jit(lambda variables: ir.nn.value_and_grad(model, loss, variables))
    value, grads, state = evaluate(variables)
    optimizer = optax.sgd(1e-3)
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    trained = {**state, "params": optax.apply_updates(variables["params"], updates)}
    assert float(evaluate(trained)[0]) < float(value)
    moved = trained["params"]["scale0_blocks"]["mixing"]
    assert float(jnp.abs(moved - variables["params"]["scale0_blocks"]["mixing"]).min()) > 0.0


@pytest.mark.slow
def test_a_model_of_images_is_inverted():
    model = ir.nn.ImageFlow(image_shape=(2, 4, 1), depths=(1,), features=2, mixing=True)
    x = jax.random.uniform(jax.random.key(0), (8, 2, 4, 1))
    variables = ir.nn.shrink(model, jax.jit(model.init)(jax.random.key(1), x))
    flow = model.flow(variables).with_bounds()
    latents = quick_jit(lambda x: flow.forward(x))(x)
    back, info = quick_jit(lambda z: flow.inverse(z))(latents)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert np.isfinite(ir.inverse_error_bound(flow, info, latents)).all()


def test_broken_weights_are_not_certified_and_named(model, variables):
    def broken(path, leaf):
        return leaf.at[0].set(jnp.nan) if path[-1].key == "mixing" else leaf

    params = jax.tree_util.tree_map_with_path(broken, variables["params"])
    certificate = ir.certify(model, {**variables, "params": params})
    assert not certificate.certified
    assert [block.problem for block in certificate.failures] == [
        "not finite: the weights of Invertible1x1 in scale 0, block 0"
    ]


def test_saved_variables_without_it_load_and_others_are_refused(model, variables, x):
    plain = ir.nn.VectorFlow(dim=3, depth=2, features=(6,))
    saved = jax.jit(plain.init)(jax.random.key(1), x)
    assert ir.certify(plain, saved).blocks
    with pytest.raises(ValueError, match="mixing"):
        plain.flow(variables)
    with pytest.raises(ValueError, match="mixing"):
        model.flow(saved)
