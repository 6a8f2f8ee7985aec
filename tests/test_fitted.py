"""What a fitted model says of grey levels, and which parts of one fit together."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rest_slow

import iresnet_jax as ir

KEY = jax.random.key(0)
SHAPE, LEVELS = (2, 2, 1), 2
#: Every image of two grey levels and four pixels.
IMAGES = np.array(list(itertools.product(range(LEVELS), repeat=4))).reshape(-1, *SHAPE)


@functools.cache
def network():
    model = ir.nn.ImageFlow(image_shape=SHAPE, depths=(2,), features=6, domain="logit")
    x = jax.random.uniform(KEY, (50, *SHAPE))
    return model, jax.jit(model.init)(KEY, x)


@functools.cache
def fitted(learned):
    model, variables = network()
    if not learned:
        return ir.Fitted(model, variables, num_levels=LEVELS)
    module = ir.nn.VariationalDequantization(LEVELS, features=3, couplings=2)

    @jax.jit
    def weights(key):
        fresh = module.init(key, IMAGES, key)
        return jax.tree.map(lambda w: w + 0.2 * jax.random.normal(key, w.shape), fresh)

    moved = weights(KEY)
    return ir.Fitted(model, variables, num_levels=LEVELS, dequantizer=ir.Dequantizer(module, moved))


uniform_or_learned = pytest.mark.parametrize(
    "learned", rest_slow([False, True], True), ids=["uniform", "learned"]
)


@uniform_or_learned
def test_the_probabilities_of_all_images_add_up(learned):
    """Σₖ E[2^(−D·bits)] = Σₖ P(k), the mass in the unit cube, of which samples tell, too.

    Within four standard errors, which are small. The logit's margin lets a little mass out.
    """
    model, draws, count = fitted(learned), 1000, 20_000
    samples = np.asarray(model.sample(KEY, count)[0]).reshape(count, -1)
    inside = ((samples >= 0.0) & (samples <= 1.0)).all(axis=1).mean()
    bits = jax.jit(jax.vmap(lambda key: model.bits_per_dim(IMAGES, key=key)))
    weights = np.exp2(-4.0 * np.asarray(bits(jax.random.split(KEY, draws)), np.float64))
    errors = weights.var(axis=0, ddof=1).sum() / draws, inside * (1.0 - inside) / count
    error = np.sqrt(sum(errors))
    assert error < 0.03
    assert inside > 0.9
    assert abs(weights.mean(axis=0).sum() - inside) < 4.0 * error


@pytest.mark.parametrize("learned", rest_slow([False, True], False), ids=["uniform", "learned"])
def test_one_image_is_as_in_a_batch(learned):
    model, keys = fitted(learned), jax.random.split(KEY, len(IMAGES))
    batch = model.bits_per_dim(IMAGES, key=keys)
    one = model.bits_per_dim(IMAGES[3], key=keys[3:4])
    assert one.shape == () and batch.shape == (len(IMAGES),)
    np.testing.assert_allclose(one, batch[3], rtol=1e-5)


def test_bits_of_vectors_are_of_their_density():
    """Under jit first: what is kept of a model then serves without jit, too."""
    model = ir.nn.VectorFlow(dim=2, depth=1, features=(4,))
    x = jax.random.normal(KEY, (5, 2))
    plain = ir.Fitted(model, jax.jit(model.init)(KEY, x))
    np.testing.assert_allclose(jax.jit(plain.log_prob)(x), plain.log_prob(x), rtol=1e-5)
    assert plain.certificate.certified
    expected = -plain.log_prob(x) / (2.0 * np.log(2.0))
    np.testing.assert_allclose(plain.bits_per_dim(x), expected, rtol=1e-6)


def test_a_certificate_compiles_the_network_and_each_shape_of_layer():
    """Not each operation on known values by itself, which made loading a model slow."""
    model = ir.nn.VectorFlow(dim=3, depth=2, features=(11, 13))
    flow = ir.Fitted(model, jax.jit(model.init)(KEY, jax.random.normal(KEY, (5, 3))))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name)
    )
    assert flow.certificate.certified
    assert 4 <= sum("backend_compile" in name for name in compiled) <= 8


def test_what_does_not_fit_is_refused():
    model = fitted(True)
    with pytest.raises(ValueError, match=r"pass a key="):
        model.bits_per_dim(IMAGES)
    with pytest.raises(ValueError, match="batch"):
        model.bits_per_dim(IMAGES[:, :1], key=KEY)
    with pytest.raises(TypeError, match="integer grey levels"):
        model.bits_per_dim(jnp.zeros((1, *SHAPE)), key=KEY)
    with pytest.raises(ValueError, match=r"Grey levels must lie in \[0, 1\]"):
        model.bits_per_dim(IMAGES + 1, key=KEY)
    with pytest.raises(ValueError, match="A dequantizer of 2 grey levels needs as many"):
        ir.Fitted(model.model, model.variables, num_levels=3, dequantizer=model.dequantizer)
    with pytest.raises(ValueError, match="needs as many in num_levels; got None"):
        ir.Fitted(model.model, model.variables, dequantizer=model.dequantizer)


ABOUT = {
    "data": "noise",
    "left_out": [],
    "results": {
        "bits_per_dim": 1.83871,
        "bits_per_dim_stderr": 0.00198,
        "bits_per_dim_bias_bound": 0.001,
        "bits_per_dim_sampling_stderr": 0.0142,
        "terms": [3, 4],
        "of": "a | b\nc",
    },
}


def test_a_card_tells_all_that_is_known():
    """By model_cards alone, of which ``Fitted.card`` is a call."""
    lines = ir.model_cards.model_card(ABOUT, certified=True).splitlines()
    assert "- invertible: proved of the weights as loaded" in lines
    likelihood = "1.8387 ± 0.002 (bias ≤ 0.001); ± 0.014 over the choice of examples"
    assert f"- held-out bits/dim: {likelihood}" in lines
    assert {"- data: noise", "- left out: nothing", "| terms | 3, 4 |", "## Results"} <= set(lines)
    assert "| of | a \\| b c |" in lines
    assert "NOT proved" in ir.model_cards.model_card({}, certified=False)


def test_a_prompt_shows_one_line():
    model = fitted(learned=True)
    size = ir.nn.num_parameters(model.variables)
    assert repr(model) == f"<Fitted: ImageFlow, {size:,} parameters>"
    assert repr(model.dequantizer).startswith("<Dequantizer: VariationalDequantization, ")
