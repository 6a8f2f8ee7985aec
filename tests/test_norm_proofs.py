"""Bounds on norms are proved once for the same weights, and anew for any others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Geometry, dense_matrix, operator_norm

from iresnet_jax import Affine, DenseOperator, Sequential, certify_branch, conv_operator
from iresnet_jax import norm_proofs as proofs
from iresnet_jax.bounds import layer_upper_bound
from iresnet_jax.norm_proofs import operator_digest, proved_norm, tree_digest

GEOMETRY = Geometry((4, 4), (3, 3), (2, 2))


def convolution(image=(4, 4), **options):
    return conv_operator(jnp.asarray(GEOMETRY.kernel()), image, **options)


def dense(seed=0, dtype=jnp.float32):
    return DenseOperator(jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4)), dtype))


@pytest.fixture
def asked(monkeypatch):
    """The operators whose bounds are proved, from an empty memory."""
    found = []

    def counted(operator):
        found.append(operator)
        return layer_upper_bound(operator)

    monkeypatch.setattr(proofs, "_proved", type(proofs._proved)())
    monkeypatch.setattr(proofs, "layer_upper_bound", counted)
    return found


@pytest.mark.parametrize("operator", [dense(), convolution()], ids=["dense", "convolution"])
def test_the_same_weights_are_proved_once(asked, operator):
    bound = proved_norm(operator)
    assert bound == layer_upper_bound(operator)
    copy = dataclasses.replace(operator, kernel=np.array(operator.kernel))
    assert proved_norm(operator) == proved_norm(copy) == bound
    assert Affine(copy, jnp.ones(operator.kernel.shape[-1])).lipschitz_bound() == bound
    assert len(asked) == 1


OTHERS = {
    "kernel": lambda: dense(1),
    "type of the kernel": lambda: dense(0, jnp.bfloat16),
    "same bits of another type": lambda: DenseOperator(
        jax.lax.bitcast_convert_type(dense(0, jnp.bfloat16).kernel, jnp.float16)
    ),
    "shape": lambda: DenseOperator(dense().kernel.reshape(4, 3)),
    "one bit": lambda: DenseOperator(dense().kernel.at[0, 0].multiply(1 + 2.0**-23)),
    "image": lambda: convolution((4, 5)),
    "strides": lambda: convolution(strides=(1, 2)),
    "padding": lambda: convolution(padding="VALID"),
    "dilation": lambda: convolution(dilation=2),
    "kind": lambda: DenseOperator(convolution().kernel.reshape(6, 6)),
}


def test_whatever_differs_is_proved_anew(asked):
    operators = [dense(), convolution(), *(make() for make in OTHERS.values())]
    bounds = [proved_norm(operator) for operator in operators]
    assert len(asked) == len(operators) == len({operator_digest(op) for op in operators})
    assert bounds == [layer_upper_bound(operator) for operator in operators]
    assert [proved_norm(operator) for operator in operators] == bounds
    assert len(asked) == len(operators)


def test_a_dense_layer_is_not_taken_for_the_convolution_of_its_entries(asked):
    """The same bits of the same shape as kernels of two geometries have two norms."""
    small, large = convolution((2, 2)), convolution((6, 6))
    np.testing.assert_array_equal(small.kernel, large.kernel)
    for operator, image in ((small, (2, 2)), (large, (6, 6))):
        truth = operator_norm(dense_matrix(GEOMETRY._replace(image=image), GEOMETRY.kernel()))
        assert truth <= proved_norm(operator) <= 1.0001 * truth


def test_weights_changed_in_place_are_proved_anew(asked):
    kernel = np.eye(3, dtype=np.float32)
    assert proved_norm(DenseOperator(kernel)) == pytest.approx(1.0)
    kernel *= 2.0
    assert proved_norm(DenseOperator(kernel)) == pytest.approx(2.0)
    assert len(asked) == 2


def test_the_memory_forgets_what_was_asked_for_longest_ago(asked, monkeypatch):
    monkeypatch.setattr(proofs, "_MOST", 2)
    for seed in (0, 1, 0, 2):  # 1 has not been asked for since
        proved_norm(dense(seed))
    assert len(asked) == 3
    proved_norm(dense(0))
    assert len(asked) == 3
    proved_norm(dense(1))
    assert len(asked) == 4


def test_a_branch_and_its_certificate_share_the_proofs(asked):
    layer = Affine(DenseOperator(0.5 * jnp.eye(3)))
    branch = Sequential((layer, Sequential((layer, layer))))
    certificate = certify_branch(branch, "it", (3,))
    assert len(asked) == 1 and len(certificate.layers) == 3
    assert certificate.digest == tree_digest(branch) != tree_digest(layer)
    assert branch.lipschitz_bound() == pytest.approx(0.125) and len(asked) == 1


def test_broken_weights_are_remembered_as_broken(asked):
    broken = DenseOperator(jnp.full((2, 2), jnp.nan))
    assert np.isnan([proved_norm(broken), proved_norm(broken)]).all() and len(asked) == 1


def test_a_traced_kernel_has_no_digest():
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda kernel: proved_norm(DenseOperator(kernel)))(jnp.eye(2))


@pytest.mark.parametrize("wrap", [lambda cls: cls, dataclasses.dataclass(frozen=True)])
def test_an_operator_of_another_kind_has_no_bound(wrap):
    @wrap
    class Diagonal:
        kernel: jax.Array = ()

    with pytest.raises(TypeError, match="No upper bound is known for operators of type Diagonal"):
        proved_norm(Diagonal())
