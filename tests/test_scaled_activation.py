"""Activations with a length of their own, alone and in branches normalised as a whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from activation_cases import reference
from helpers import rest_slow
from monlip_cases import DENSE, TWO, WIDE, jacobians, normalised

import iresnet_jax as ir
from iresnet_jax import nn
from iresnet_jax.stages import first_without_activation

LENGTHS = [1e-12, 1e-6, 0.1, 1.0, 3.0, 1e6, 1e12]


def exact(name, length, x):
    length = np.asarray(length, np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        return length * reference(name, np.asarray(x, np.longdouble) / length)


@pytest.mark.parametrize("name", ir.ACTIVATIONS)
def test_slopes_are_those_of_the_activation(name, x64):
    length = jnp.asarray([1e-6, 0.1, 7.0])
    stage = ir.ScaledActivation(length, name)
    units = np.linspace(-8, 8, 1601)[:, None]
    slopes = jax.vmap(jax.grad(lambda v: stage(v[None]).sum()))(jnp.asarray(units * length))
    low, high = stage.slopes()
    assert (low, high) == ir.ACTIVATIONS[name].slopes
    assert low - 1e-12 <= slopes.min() and slopes.max() <= high + 1e-12
    assert slopes.max() > 0.9 * high  # attained
    assert stage.lipschitz_bound() == ir.ACTIVATIONS[name].lipschitz


@pytest.mark.parametrize("name", rest_slow(ir.ACTIVATIONS, "elu", "tanh"))
def test_derivatives_are_those_of_the_formula(name, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    along = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)))
    length = jnp.asarray([0.1, 0.5, 3.0])
    phi = ir.ACTIVATIONS[name].function

    def formula(x, length):
        return length * phi(x / length)

    def stage(x, length):
        return ir.ScaledActivation(length, name)(x)

    def product(map_):  # of the Jacobian with a vector, as a log-determinant takes it
        return lambda x, length: jax.jvp(lambda x: map_(x, length), (x,), (along,))[1]

    for found, expected in ((stage, formula), (product(stage), product(formula))):
        np.testing.assert_allclose(found(x, length), expected(x, length), rtol=1e-12)
        for argument in (0, 1):
            pair = [
                jax.grad(lambda *a, f=f: (f(*a) ** 2).sum(), argument)(x, length)
                for f in (found, expected)
            ]
            np.testing.assert_allclose(*pair, rtol=1e-9, atol=1e-12)


TYPES = [(jnp.float32, jnp.float32), (jnp.float64, jnp.float64), (jnp.bfloat16, jnp.float64)]


def hostile(length, dtype):
    """From where quotients are flushed to zero to far beyond the bend, and zero."""
    rng = np.random.default_rng(0)
    units = rng.choice([-1.0, 1.0], 3000) * 10.0 ** rng.uniform(-44, 2, 3000)
    bend = rng.normal(size=1000)
    return jnp.asarray(np.concatenate([units, bend, [0.0]]) * length, dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", rest_slow(ir.ACTIVATIONS, "elu", "softplus", "relu"))
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_rounding_is_within_its_bound(name, types, length, x64):
    dtype, error_type = types
    stage = ir.ScaledActivation(jnp.asarray([length], dtype), name)
    used, unit = float(stage.length[0]), float(jnp.finfo(dtype).eps) / 2
    x = hostile(used, dtype)[:, None]
    wide = np.asarray(x, np.float64)[:, 0]
    off = np.abs(np.asarray(stage(x), np.float64)[:, 0] - exact(name, used, wide))
    no_error = jnp.zeros(len(x), error_type)
    bound = np.asarray(stage.rounding(x, no_error, ir.Arithmetic(unit)), np.float64)
    assert (off <= bound).all()
    seen = np.abs(wide) > 1e-10  # below, squares are flushed
    within = 1e-6 < length < 1e12  # beyond, bfloat16 cannot tell the length from the limit
    assert not within or (bound <= 200 * unit * (np.abs(wide) + length))[seen].all()


FLUSHED = [("relu", 1e4, 1e-35), ("relu", 1e12, 1e-27), ("tanh", 1e12, 1e-28)]


@pytest.mark.parametrize(("name", "length", "x"), FLUSHED)
def test_a_quotient_that_is_flushed_to_zero_is_bounded(name, length, x, x64):
    """In bfloat16 with an error in float64, as a branch in bfloat16 has of float64 data."""
    branch = ir.Sequential((ir.ScaledActivation(jnp.asarray([length]), name),), "bfloat16")
    (out,), (bound,) = branch(jnp.asarray([[x]])), branch.rounding_bound(jnp.asarray([[x]]))
    assert abs(float(out[0]) - x) <= float(bound)


def test_a_steep_function_is_bounded_where_its_argument_is_flushed():
    ir.register_activation("steep", lambda x: 1e9 * jnp.tanh(x), 1e9, (20.0, 0.0), slopes=(0, 1e9))
    try:
        stage = ir.ScaledActivation(jnp.asarray([1e12], jnp.float32), "steep")
        x = jnp.asarray([[1e-27]], jnp.float32)
        bound = stage.rounding(x, jnp.zeros(1), ir.Arithmetic(2.0**-24))
        assert abs(float(stage(x)[0, 0]) - 1e-18) <= float(bound[0])
    finally:
        del ir.ACTIVATIONS["steep"]


@pytest.mark.parametrize(
    "reach", [1e-3, pytest.param(1e17, id="where a square does not overflow, but a quotient may")]
)
def test_an_error_of_the_input_passes_by_the_slope(reach, x64):
    stage = ir.ScaledActivation(jnp.asarray([0.1, 2.0], jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)), jnp.float32)
    near = x + reach * jnp.asarray([0.6, 0.8], jnp.float32)
    bound = stage.rounding(x, jnp.full(50, reach, jnp.float32), ir.Arithmetic(2.0**-24))
    wide = ir.ScaledActivation(jnp.asarray(stage.length, jnp.float64))
    off = stage(near) - wide(jnp.asarray(x, jnp.float64))
    assert (jnp.linalg.norm(off, axis=1) <= bound).all()
    assert bound.max() < 1.01 * reach + 1e-5


def test_nothing_is_stated_where_a_quotient_may_overflow():
    stage = ir.ScaledActivation(jnp.asarray([1e-12], jnp.float32), "relu")
    x = jnp.asarray([[1e15], [3e26], [1.0]], jnp.float32)
    bound = stage.rounding(x, jnp.asarray([0.0, 0.0, 1e27]), ir.Arithmetic(2.0**-24))
    assert jnp.isfinite(bound).tolist() == [True, False, False]


BROKEN = [0.0, -1.0, 1e-13, 1e13, np.nan, np.inf]


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
    idle = jax.tree.map(lambda leaf: leaf[0], found).stages[0]
    error = jnp.arange(4.0)
    np.testing.assert_array_equal(idle.rounding(x, error, ir.Arithmetic(2.0**-24)), error)


# In branches normalised as a whole


def with_lengths(case, lengths, activation="elu"):
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        chosen = tuple(jnp.asarray(rng.choice(lengths, width)) for width in case[1])
    return dataclasses.replace(normalised(case, activation), lengths=chosen)


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
    with pytest.raises(ValueError, match="as many lengths, or none; got 1"):
        dataclasses.replace(normalised(TWO), lengths=(jnp.ones(6),))


def test_a_module_learns_lengths_unless_told_not_to():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    module = nn.MonLip((4, 4), length=0.25)
    variables = module.init(jax.random.key(0), x)
    assert {"log_length_0", "log_length_1"} < set(variables["params"])
    (stage,) = module.apply(variables, (3,), method="pure").stages
    np.testing.assert_allclose(jnp.stack(stage.lengths), 0.25, rtol=1e-6)
    fixed = nn.MonLip((4, 4), length=None)
    rest = {k: v for k, v in variables["params"].items() if "length" not in k}
    ones = {**variables["params"], "log_length_0": jnp.zeros(4), "log_length_1": jnp.zeros(4)}
    np.testing.assert_allclose(
        fixed.apply({**variables, "params": rest}, x),
        module.apply({**variables, "params": ones}, x),
        rtol=1e-6,
    )


def test_a_module_without_lengths_refuses_variables_with_some():
    x = jnp.ones((2, 3))
    variables = nn.MonLip((4,)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"hold log_length_0 in .*of another model"):
        nn.MonLip((4,), length=None).apply(variables, x)


@pytest.mark.parametrize("length", [0.0, -1.0, 1e-9, 1e40, float("nan"), float("inf")])
def test_a_module_refuses_a_length_out_of_range(length):
    for module in (nn.MonLip((4,), length=length), nn.ScaledActivation(length=length)):
        with pytest.raises(ValueError, match=f"length of a {type(module).__name__} must lie in"):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 3)))


# By name


def test_a_flow_of_learned_lengths_is_certified_and_inverted():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
    model = nn.VectorFlow(dim=3, depth=2, features=(8,), activation="learned_elu")
    variables = jax.jit(model.init)(jax.random.key(0), x)
    leaves = jax.tree.leaves_with_path(variables["params"])
    lengths = [leaf for path, leaf in leaves if "log_length_0" in str(path)]
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
    assert jnp.all(bound < 1e-3) and jnp.all(off <= 1e-5)
    with jax.enable_x64(True):
        in_double = ir.inverse_error_in_double(flow, back, latents)
    assert np.all(np.asarray(in_double) < 1e-4)


def test_lengths_stay_within_their_range():
    module = nn.ScaledActivation()
    far = {"params": {"log_length_0": jnp.asarray([-1e3, 0.0, 1e3])}}
    stage = module.apply(far, (3,), method="pure")
    np.testing.assert_allclose(stage.length, [1e-8, 1.0, 1e8], rtol=1e-4)
    assert stage.lipschitz_bound() == 1.0
    lost = {"params": {"log_length_0": jnp.asarray([jnp.nan, 0.0, 0.0])}}
    assert module.apply(lost, (3,), method="pure").lipschitz_bound() == np.inf


@pytest.mark.parametrize("name", ["learned_elu", "learned_mine", "maxmin"])
def test_names_of_modules_cannot_be_registered(name):
    with pytest.raises(ValueError, match=r"Choose another name|choose another name"):
        ir.register_activation(name, jnp.tanh, 1.0)


def test_a_branch_normalised_as_a_whole_takes_the_name_too():
    assert nn.monlip_branch(3, 4, activation="learned_tanh").activation == "tanh"


def test_unknown_names_are_refused_with_learned_before_them():
    model = nn.VectorFlow(dim=3, depth=2, features=(8,), activation="learned_gelu")
    with pytest.raises(ValueError, match="Unknown activation 'learned_gelu'"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 3)))
