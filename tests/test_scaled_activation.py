"""Activations with a length of their own, alone and in branches normalised as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_cases import reference
from helpers import rest_slow
from monlip_cases import DENSE, TWO, WIDE
from test_monlip import jacobians, normalised

import iresnet_jax as ir
from iresnet_jax import nn
from iresnet_jax.stages import first_without_activation

LENGTHS = [1e-30, 1e-6, 0.1, 1.0, 3.0, 1e6, 1e30]


def exact(name, scale, x):
    scale = np.asarray(scale, np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        return scale * reference(name, np.asarray(x, np.longdouble) / scale)


@pytest.mark.parametrize("name", ir.ACTIVATIONS)
def test_slopes_are_those_of_the_activation(name, x64):
    scale = jnp.asarray([1e-6, 0.1, 7.0])
    stage = ir.ScaledActivation(scale, name)
    units = np.linspace(-8, 8, 1601)[:, None]
    slopes = jax.vmap(jax.grad(lambda v: stage(v[None]).sum()))(jnp.asarray(units * scale))
    low, high = stage.slopes()
    assert (low, high) == ir.ACTIVATIONS[name].slopes
    assert low - 1e-12 <= slopes.min() and slopes.max() <= high + 1e-12
    assert slopes.max() > 0.9 * high  # attained
    assert stage.lipschitz_bound() == ir.ACTIVATIONS[name].lipschitz


@pytest.mark.parametrize("name", rest_slow(ir.ACTIVATIONS, "elu", "softplus"))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_rounding_is_within_its_bound(name, dtype, x64):
    rng, unit = np.random.default_rng(0), float(jnp.finfo(dtype).eps) / 2
    scale = jnp.asarray(LENGTHS, dtype)
    stage = ir.ScaledActivation(scale, name)
    used = np.asarray(scale, np.float64)
    units = rng.normal(size=(4000, len(LENGTHS))) * 10.0 ** rng.uniform(-8, 2, (4000, 1))
    x = jnp.asarray(units * used, dtype)
    wide = np.asarray(x, np.float64)
    for channel, length in enumerate(used):  # each alone: a norm would hide the smaller ones
        one = dataclasses.replace(stage, scale=scale[channel : channel + 1])
        part = x[:, channel : channel + 1]
        out = np.asarray(one(part), np.float64)[:, 0]
        off = np.abs(out - exact(name, length, wide[:, channel]))
        no_error = jnp.zeros(len(x), jnp.promote_types(dtype, jnp.float32))
        bound = np.asarray(one.rounding(part, no_error, ir.Arithmetic(unit)), np.float64)
        assert (off <= bound).all()
        moderate = 1e-6 < length < 1e6
        assert not moderate or (bound <= 200 * unit * (np.abs(wide[:, channel]) + length)).all()


def test_an_error_of_the_input_passes_by_the_slope(x64):
    stage = ir.ScaledActivation(jnp.asarray([0.1, 2.0]))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)))
    near = x + 1e-3 * jnp.asarray([0.6, 0.8])
    bound = stage.rounding(x, jnp.full(50, 1e-3), ir.Arithmetic(2.0**-53))
    assert (jnp.linalg.norm(stage(near) - stage(x), axis=1) <= bound).all()
    assert bound.max() < 1.001e-3


BROKEN = [0.0, -1.0, np.nan, np.inf]


@pytest.mark.parametrize("length", BROKEN)
def test_of_lengths_that_are_none_nothing_is_stated(length):
    stage = ir.ScaledActivation(jnp.asarray([1.0, length]))
    assert stage.lipschitz_bound() == np.inf
    assert ir.stated_slopes(stage) is None
    bound = stage.rounding(jnp.ones((3, 2)), jnp.zeros(3), ir.Arithmetic(2.0**-24))
    assert np.isinf(bound).all()


def test_unknown_names_and_other_channels_are_refused():
    with pytest.raises(ValueError, match="Unknown activation 'gelu'"):
        ir.ScaledActivation(jnp.ones(2), "gelu")
    for shape in ((2,), (1, 3)):
        with pytest.raises(ValueError, match=r"τ of shape \(2,\)"):
            ir.ScaledActivation(jnp.ones(2))(jnp.ones(shape))


@pytest.mark.parametrize("name", ["elu", "lipswish"])
def test_the_first_block_of_a_stack_leaves_it_out(name):
    def branches(kind):
        stages = (kind, ir.Affine(ir.DenseOperator(0.1 * jnp.ones((2, 3, 3))), jnp.zeros((2, 3))))
        return first_without_activation(ir.Sequential(stages), 2)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    plain = branches(ir.Activation(name))
    found = branches(ir.ScaledActivation(jnp.ones((2, 3)), name))
    for i in range(2):
        left, right = (jax.tree.map(lambda leaf, at=i: leaf[at], b) for b in (found, plain))
        np.testing.assert_allclose(left(x), right(x), rtol=1e-6)
        assert left.stages[0].slopes() == right.stages[0].slopes()
        assert left.lipschitz_bound() == right.lipschitz_bound()
        assert np.all(right.rounding_bound(x) <= left.rounding_bound(x))
        assert np.all(left.rounding_bound(x) < 1e-5)


# In branches normalised as a whole


def with_lengths(case, lengths, activation="elu"):
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        scales = tuple(jnp.asarray(rng.choice(lengths, width)) for width in case[1])
    return dataclasses.replace(normalised(case, activation), scales=scales)


@pytest.mark.parametrize("activation", ["elu", "tanh"])
@pytest.mark.parametrize("case", rest_slow([DENSE, TWO, WIDE], WIDE), ids=str)
def test_no_jacobian_exceeds_l(x64, case, activation):
    branch = with_lengths(case, [1e-3, 0.1, 1.0, 30.0], activation)
    norms = [np.linalg.norm(j, 2) for j in jacobians(branch, case)]
    assert 0.1 < max(norms) <= branch.lipschitz_bound()
    assert branch.lipschitz_bound() == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("case", rest_slow([DENSE, TWO, WIDE], DENSE), ids=str)
def test_a_branch_rounds_within_its_bound(case):
    with jax.enable_x64(True):
        wide = with_lengths(case, [1e-3, 0.1, 1.0, 30.0])
        x = jnp.asarray(np.random.default_rng(3).normal(size=(4, *case[0])), jnp.float32)
        branch = ir.Sequential((jax.tree.map(lambda leaf: leaf.astype(jnp.float32), wide),))
        used = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), branch.stages[0])
        off = np.reshape(jax.jit(branch)(x) - jax.jit(used)(x.astype(jnp.float64)), (4, -1))
        bound = np.asarray(jax.jit(branch.rounding_bound)(x))
    assert np.all(np.linalg.norm(off, axis=1) <= bound) and np.all(bound < 1e-2)


@pytest.mark.parametrize("length", BROKEN)
def test_no_branch_is_bounded_with_lengths_that_are_none(x64, length):
    assert with_lengths(TWO, [length]).lipschitz_bound() == np.inf


def test_another_number_of_lengths_is_refused():
    with pytest.raises(ValueError, match="as many scales, or none; got 1"):
        dataclasses.replace(normalised(TWO), scales=(jnp.ones(6),))


def test_a_module_learns_lengths_unless_told_not_to():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    module = nn.MonLip((4, 4), scale=0.25)
    variables = module.init(jax.random.key(0), x)
    assert {"log_scale_0", "log_scale_1"} < set(variables["params"])
    (stage,) = module.apply(variables, (3,), method="pure").stages
    np.testing.assert_allclose(jnp.stack(stage.scales), 0.25, rtol=1e-6)
    fixed = nn.MonLip((4, 4), scale=None)
    rest = {k: v for k, v in variables["params"].items() if "scale" not in k}
    ones = {**variables["params"], "log_scale_0": jnp.zeros(4), "log_scale_1": jnp.zeros(4)}
    np.testing.assert_allclose(
        fixed.apply({**variables, "params": rest}, x),
        module.apply({**variables, "params": ones}, x),
        rtol=1e-6,
    )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_module_refuses_a_length_that_is_none(scale):
    for module in (nn.MonLip((4,), scale=scale), nn.ScaledActivation(scale=scale)):
        with pytest.raises(ValueError, match=f"scale of a {type(module).__name__} must be posit"):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3)))


# By name


def test_a_flow_of_learned_lengths_is_certified_and_inverted():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    model = nn.VectorFlow(dim=3, depth=2, features=(8,), activation="learned_elu")
    variables = jax.jit(model.init)(jax.random.key(0), x)
    leaves = jax.tree.leaves_with_path(variables["params"])
    lengths = [leaf for path, leaf in leaves if "log_scale_0" in str(path)]
    assert len(lengths) == 2
    np.testing.assert_allclose(jnp.exp(lengths[0]), 0.1, rtol=1e-6)
    variables = nn.shrink(model, nn.converge(model, variables))
    certificate = model.flow(variables).certify()
    assert certificate.certified
    assert all(b.lipschitz <= b.product for b in certificate.branches)
    flow = model.flow(variables).with_bounds(certificate)
    latents = flow.forward(x)
    back, info = flow.inverse(latents, ir.FixedPointIteration(1e-6))
    off = jnp.linalg.norm(back - x, axis=1)
    bound = ir.inverse_error_bound(flow, info, latents)
    assert jnp.all(bound < 1e-3) and jnp.all(off <= bound + 1e-6)


def test_a_branch_normalised_as_a_whole_takes_the_name_too():
    assert nn.monlip_branch(3, 4, activation="learned_tanh").activation == "tanh"


def test_unknown_names_are_refused_with_learned_before_them():
    model = nn.VectorFlow(dim=3, depth=2, features=(8,), activation="learned_gelu")
    with pytest.raises(ValueError, match="Unknown activation 'learned_gelu'"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3)))
