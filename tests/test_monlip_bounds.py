"""The traced bound on λ_max(V + Vᵀ + 2SSᵀ), against dense eigenvalues in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow
from monlip_cases import CASES, DENSE, TWO, WIDE, circular_form, dense_form, raw

import iresnet_jax as ir
from iresnet_jax import monlip_proofs
from iresnet_jax.monlip import scaled
from iresnet_jax.monlip_bounds import eigenvalue_bound

L = float(np.float32(0.9))


def in_type(layers, dtype):
    return jax.tree.map(lambda kernel: kernel.astype(dtype), layers)


def proves(inputs, hidden, bound):
    """Whether weights scaled by the bound, rounded in their type, are proved to meet 2I with L."""
    return monlip_proofs.holds(*scaled(inputs, hidden, bound, L), L)


@pytest.mark.parametrize("case", rest_slow(CASES, DENSE, WIDE), ids=str)
@pytest.mark.parametrize(
    "dtype", [jnp.float64, jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__
)
def test_it_is_above_the_largest_eigenvalue_and_close(x64, case, dtype):
    layers = in_type(raw(case), dtype)
    bound = float(eigenvalue_bound(*layers))
    exact = in_type(layers, jnp.float64)
    own = np.linalg.eigvalsh(dense_form(case, exact))[-1]
    if len(case[0]) == 3:  # the image is a corner of a torus
        height, width, channels = case[0]
        torus = (height + 1, width + 1, channels), *case[1:]
        whole = np.linalg.eigvalsh(circular_form(torus, exact))[-1]
    else:
        whole = own
    assert own <= whole <= bound < whole * (1.3 if dtype == jnp.bfloat16 else 1.02)
    assert proves(*layers, bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_scaled_by_it_weights_of_any_kind_meet_the_condition(dtype):
    """Random, orthonormal, of rank one, of one layer alone, and of any size."""
    rng = np.random.default_rng(0)
    bounded = jax.jit(eigenvalue_bound)
    for trial in range(60):
        q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        s = [rng.normal(size=(8, 8)), q, np.outer(q[0], q[1]), np.zeros((8, 8))][trial % 4]
        v = [q, rng.normal(size=(8, 8)), np.ones((8, 8)), np.zeros((8, 8))][trial // 4 % 4]
        size = 10.0 ** rng.uniform(-12, 12)
        inputs = [ir.DenseOperator(jnp.asarray(k * size, dtype)) for k in (s, 0.5 * s[::-1])]
        hidden = [ir.DenseOperator(jnp.asarray(v * size, dtype))]
        assert proves(inputs, hidden, bounded(inputs, hidden)), (trial, size)


def test_its_gradient_is_that_of_differences(x64):
    inputs, hidden = raw(TWO)
    direction = jax.tree.map(
        lambda kernel: np.random.default_rng(1).normal(size=kernel.shape), (inputs, hidden)
    )

    def along(step):
        moved = jax.tree.map(lambda kernel, d: kernel + step * d, (inputs, hidden), direction)
        return eigenvalue_bound(*moved)

    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), difference, rtol=1e-5)


def test_weights_that_are_not_finite_have_none():
    for broken in (jnp.nan, jnp.inf):
        inputs = [ir.DenseOperator(jnp.asarray([[1.0, broken]]))]
        assert not np.isfinite(eigenvalue_bound(inputs, []))


def test_what_it_cannot_bound_is_refused():
    inputs, hidden = raw(DENSE)
    with pytest.raises(ValueError, match="num_iterations of a Gram iteration"):
        eigenvalue_bound(inputs, hidden, -1)
    with pytest.raises(ValueError, match="does not fit"):
        eigenvalue_bound(inputs, hidden[::-1])
