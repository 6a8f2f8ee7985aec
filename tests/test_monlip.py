"""Branches that are normalised as a whole, against full Jacobians and dense eigenvalues."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow
from monlip_cases import (
    CASES,
    DENSE,
    ONE,
    TWO,
    WIDE,
    L,
    circular_form,
    dense_form,
    jacobians,
    normalised,
    raw,
)

import iresnet_jax as ir
from iresnet_jax import monlip_proofs
from iresnet_jax.monlip import scaled, transposed
from iresnet_jax.monlip_iteration import (
    advanced,
    eigenvalue_estimate,
    first_vector,
    to_tolerance,
)

FEW = ((8, 8, 1), (2, 2), 1)  # of few products, many entries


MORE = [(DENSE, "elu"), (ONE, "elu"), (TWO, "elu"), (TWO, "tanh"), (TWO, "relu")]


@pytest.mark.parametrize(
    ("case", "activation"),
    [
        (WIDE, "elu"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
    ids=str,
)
def test_no_jacobian_exceeds_l(x64, case, activation):
    branch = normalised(case, activation)
    norms = [np.linalg.norm(j, 2) for j in jacobians(branch, case)]
    assert max(norms) <= L
    assert branch.lipschitz_bound() == pytest.approx(L, rel=1e-6)


def test_much_of_l_is_used(x64):
    assert max(np.linalg.norm(j, 2) for j in jacobians(normalised(ONE, "relu"), ONE)) > 0.9 * L


def test_one_hidden_layer_is_a_gradient_map(x64):
    for jacobian in jacobians(normalised(ONE), ONE, 3):
        np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-12)


@pytest.mark.parametrize("case", rest_slow(CASES, WIDE), ids=str)
def test_the_power_iteration_finds_the_largest_eigenvalue(x64, case):
    layers = raw(case)
    vector = to_tolerance(layers, first_vector(layers[0]), rtol=1e-6, max_steps=10_000)
    found = float(eigenvalue_estimate(layers, vector))
    assert found == pytest.approx(np.linalg.eigvalsh(dense_form(case, layers))[-1], rel=1e-9)


def test_the_estimate_does_not_depend_on_the_vectors_length(x64):
    layers = raw(TWO)
    vector = first_vector(layers[0])
    longer = jax.tree.map(lambda leaf: 3.0 * leaf, vector)
    assert float(eigenvalue_estimate(layers, longer)) == pytest.approx(
        float(eigenvalue_estimate(layers, vector)), rel=1e-12
    )


LENGTHS = [1e-20, 1e7, 1e20, 0.0, np.nan, np.inf]


@pytest.mark.parametrize("length", rest_slow(LENGTHS, 1e-20, 1e20, 0.0, LENGTHS[4]))
def test_vectors_of_any_length_converge(length):
    layers = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), raw(TWO))
    start = first_vector(layers[0])
    expected = float(eigenvalue_estimate(layers, to_tolerance(layers, start)))
    vector = to_tolerance(layers, tuple(length * part for part in start))
    assert float(eigenvalue_estimate(layers, vector)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("scale", "dtype"), [(1e9, jnp.float32), (4.0, jnp.float16)])
def test_large_weights_do_not_stop_the_iteration(scale, dtype):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)) * scale, dtype)
    layers = ((ir.DenseOperator(kernel),), ())
    exact = 2.0 * np.linalg.norm(np.asarray(kernel, np.float64), 2) ** 2
    found = eigenvalue_estimate(layers, to_tolerance(layers, first_vector(layers[0])))
    assert float(found) == pytest.approx(exact, rel=1e-2)


def test_a_vector_of_another_image_is_refused():
    layers = raw(TWO)
    other = tuple(part[1:] for part in first_vector(layers[0]))
    with pytest.raises(ValueError, match="another image size"):
        eigenvalue_estimate(layers, other)


def test_a_negative_number_of_steps_is_refused():
    layers = raw(TWO)
    with pytest.raises(ValueError, match="num_steps of a power iteration"):
        advanced(layers, first_vector(layers[0]), -1)


def test_pointwise_inputs_and_wide_hidden_kernels_are_proved_by_frequency(x64, monkeypatch):
    inputs = tuple(ir.DenseOperator(0.1 * jnp.ones((2, width))) for width in (3, 4))
    hidden = (ir.conv_operator(0.01 * jnp.ones((3, 3, 3, 4)), (4, 4)),)
    biases = (jnp.zeros(3), jnp.zeros(4))
    monkeypatch.setattr(monlip_proofs, "_MOST_DENSE", 0)
    branch = ir.MonLip(inputs, hidden, biases, jnp.asarray(L))
    assert L <= branch.lipschitz_bound() <= L * (1.0 + 1e-9)


def test_an_activation_of_unknown_rounding_is_named():
    ir.register_activation("half", lambda x: 0.5 * jax.nn.relu(x), 0.5, slopes=(0.0, 0.5))
    try:
        branch = ir.MonLip(
            (ir.DenseOperator(jnp.ones((2, 3))),), (), (jnp.zeros(3),), jnp.asarray(L), "half"
        )
        assert ir.Sequential((branch,)).silent_about_rounding() == ["half"]
    finally:
        del ir.ACTIVATIONS["half"]


def test_a_layer_without_channels_and_a_row_of_shifts_are_refused():
    def branch(width, shift):
        operator = ir.DenseOperator(jnp.zeros((3, width)))
        return ir.MonLip((operator,), (), (jnp.zeros(width),), jnp.asarray(shift))

    with pytest.raises(ValueError, match="no channels"):
        branch(0, L).lipschitz_bound()
    with pytest.raises(ValueError, match="shift must be one number"):
        branch(2, [L]).lipschitz_bound()


def test_without_weights_nothing_moves():
    layers = jax.tree.map(jnp.zeros_like, raw(TWO))
    vector = to_tolerance(layers, first_vector(layers[0]))
    assert all(np.isfinite(part).all() for part in vector)
    assert float(eigenvalue_estimate(layers, vector)) == 0.0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_proof_is_sharp_and_never_wrong(x64, case):
    layers = raw(case)
    largest = np.linalg.eigvalsh(dense_form(case, layers))[-1]
    below, above = (scaled(*layers, largest * (1.0 + room), 1.0) for room in (1e-9, -1e-9))
    assert monlip_proofs.holds(*below, 1.0)
    assert not monlip_proofs.holds(*above, 1.0)


@pytest.mark.parametrize("case", rest_slow([ONE, TWO, WIDE], WIDE), ids=str)
def test_by_frequency_the_proof_is_that_of_a_torus(x64, monkeypatch, case):
    layers = raw(case)
    monkeypatch.setattr(monlip_proofs, "_MOST_DENSE", 0)
    found = monlip_proofs.largest_eigenvalue(*layers)
    assert found >= np.linalg.eigvalsh(dense_form(case, layers))[-1]
    shape = case[0]
    torus = ((shape[0] + 1, shape[1] + 1, shape[2]), *case[1:])
    circular = np.linalg.eigvalsh(circular_form(torus, layers))[-1]
    assert found == pytest.approx(circular, rel=1e-9)
    below, above = (scaled(*layers, found * (1.0 + room), 1.0) for room in (1e-9, -1e-9))
    assert monlip_proofs.holds(*below, 1.0) and not monlip_proofs.holds(*above, 1.0)


def test_weights_beyond_the_condition_have_a_larger_bound_that_holds(x64):
    branch = normalised(TWO)
    wider = dataclasses.replace(
        branch, inputs=tuple(dataclasses.replace(p, kernel=1.5 * p.kernel) for p in branch.inputs)
    )
    bound = wider.lipschitz_bound()
    assert L < bound < np.inf
    assert max(np.linalg.norm(j, 2) for j in jacobians(wider, TWO)) <= bound


@pytest.mark.parametrize("shift", [np.nan, np.inf, 0.0, -0.5])
def test_no_bound_without_a_positive_shift(x64, shift):
    branch = dataclasses.replace(normalised(ONE), shift=jnp.asarray(shift))
    assert branch.lipschitz_bound() == np.inf


def test_no_bound_for_weights_that_are_not_finite(x64):
    branch = normalised(TWO)
    broken = dataclasses.replace(branch.inputs[0], kernel=branch.inputs[0].kernel * np.nan)
    branch = dataclasses.replace(branch, inputs=(broken, branch.inputs[1]))
    assert branch.lipschitz_bound() == np.inf


def test_no_bound_where_the_hidden_layers_alone_exceed_it(x64):
    branch = normalised(TWO)
    hidden = dataclasses.replace(branch.hidden[0], kernel=100.0 + branch.hidden[0].kernel)
    assert dataclasses.replace(branch, hidden=(hidden,)).lipschitz_bound() == np.inf


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        (WIDE, "float32"),
        (FEW, "bfloat16"),
        *(pytest.param(case, "float32", marks=pytest.mark.slow) for case in (DENSE, ONE, TWO)),
    ],
    ids=str,
)
def test_rounding_is_within_its_bound(case, precision):
    with jax.enable_x64(True):
        wide = normalised(case)
        x = jnp.asarray(np.random.default_rng(3).normal(size=(4, *case[0])), jnp.float32)
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), wide)
        branch = ir.Sequential((narrow,), precision)
        used = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), branch.stages_as_used()[0])
        exact = jax.jit(used)(x.astype(jnp.float64))
        error = np.linalg.norm(np.reshape(jax.jit(branch)(x) - exact, (4, -1)), axis=1)
        bound = np.asarray(jax.jit(branch.rounding_bound)(x))
    assert np.all(error <= bound)
    assert np.all(bound < (1e-3 if precision == "float32" else 1e3))


@pytest.mark.parametrize("case", [DENSE, WIDE], ids=str)
def test_transposed_is_the_transpose(x64, case):
    operator = raw(case)[0][0]
    x = jnp.zeros((1, *case[0]))
    (exact,) = jax.linear_transpose(operator, x)(operator(x) + 1.0)
    np.testing.assert_allclose(transposed(operator)(operator(x) + 1.0), exact, rtol=1e-12)


# Refusals


@pytest.mark.parametrize("activation", ["sin", "lipswish"])
def test_other_slopes_are_refused(activation):
    with pytest.raises(ValueError, match=rf"{activation}.*has slopes in"):
        dataclasses.replace(normalised(ONE), activation=activation)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="Unknown activation 'gelu'"):
        dataclasses.replace(normalised(ONE), activation="gelu")


def test_layers_that_do_not_belong_together_are_refused():
    branch = normalised(TWO)
    with pytest.raises(ValueError, match="K inputs, K − 1 hidden"):
        dataclasses.replace(branch, hidden=())
    with pytest.raises(ValueError, match="does not fit"):
        dataclasses.replace(branch, inputs=branch.inputs[::-1]).lipschitz_bound()


def test_strides_are_refused():
    operator = ir.conv_operator(jnp.ones((3, 3, 2, 6)), (4, 4), strides=2)
    branch = ir.MonLip((operator,), (), (jnp.zeros(6),), jnp.asarray(L))
    with pytest.raises(ValueError, match="without strides"):
        branch.lipschitz_bound()
    with pytest.raises(ValueError, match="no strides"):
        branch(jnp.zeros((1, 4, 4, 2)))
