"""The classifier: its logits, the statistics of its head, the invertible network below."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CLASSIFIER, data, quick_jit, small_variables

from iresnet_jax import Exact
from iresnet_jax.nn import FeatureMoments, feature_moments, recalibrated


@pytest.fixture(scope="module")
def variables():
    return small_variables()


evaluate = quick_jit(CLASSIFIER.apply)
flow_of = quick_jit(CLASSIFIER.flow)
train = quick_jit(lambda v, x: CLASSIFIER.apply(v, x, train=True, mutable=["batch_stats"]))


def test_classifier_logits_and_batch_statistics(variables):
    x, own = data(CLASSIFIER, 8, seed=6), variables["classifier"]
    logits = evaluate(own, x)
    assert logits.shape == (8, 4)
    others = evaluate(own, x.at[2:].multiply(0.5))
    np.testing.assert_allclose(others[:2], logits[:2], rtol=1e-5, atol=1e-5)
    trained, updates = train(own, x)
    assert set(updates) == {"batch_stats"}
    latents = quick_jit(lambda flow, x: flow.forward(x))(flow_of(own), x)
    features = np.asarray(latents[-1]).reshape(-1, 12)
    np.testing.assert_allclose(
        updates["batch_stats"]["head"]["norm"]["mean"], 0.1 * features.mean(0), rtol=1e-4, atol=1e-5
    )
    assert jnp.abs(trained - logits).max() > 1e-3


def test_recalibrated_statistics_are_those_of_all_batches_together(variables):
    x, own = 3.0 + 2.0 * data(CLASSIFIER, 8, seed=8), variables["classifier"]
    moments = quick_jit(lambda v, x: feature_moments(CLASSIFIER, v, x))
    new = recalibrated(own, (moments(own, part) for part in (x[:2], x[2:])))
    assert jax.tree.structure(new) == jax.tree.structure(own)
    trained, _ = train(own, x)
    np.testing.assert_allclose(evaluate(new, x), trained, rtol=1e-4, atol=1e-5)
    assert jnp.abs(evaluate(own, x) - trained).max() > 1e-2


def test_recalibration_touches_nothing_but_the_statistics_of_the_head(variables):
    own = variables["classifier"]
    mine = {"a_branch_of_ones_own": {"count": jnp.ones(3)}}
    stats = own["batch_stats"]
    old = stats["head"]["norm"]["mean"]
    one = FeatureMoments(1, old + 1.0, old + 2.0)
    new = recalibrated({**own, "batch_stats": {**stats, **mine}}, [one])
    expected = {"head": {"norm": {"mean": one.mean, "var": one.var}}, **mine}
    jax.tree.map(np.testing.assert_allclose, new, {**own, "batch_stats": expected})


def test_what_cannot_be_recalibrated_is_refused(variables):
    with pytest.raises(ValueError, match="at least one batch; got none"):
        recalibrated(variables["classifier"], [])
    one = FeatureMoments(1, jnp.zeros(1), jnp.ones(1))
    with pytest.raises(ValueError, match=r"params, spectral, have no BatchNorm in a head"):
        recalibrated(variables["vector"], [one])
    with pytest.raises(ValueError, match=r"mean has shape \(1,\); this classifier's features have"):
        recalibrated(variables["classifier"], [one])
    empty = jnp.zeros((0, *CLASSIFIER.image_shape))
    with pytest.raises(ValueError, match=r"needs an image; got an array of shape \(0, "):
        feature_moments(CLASSIFIER, variables["classifier"], empty)


def test_the_classifiers_network_inverts_to_the_unpadded_image(variables):
    flow = flow_of(variables["classifier"])
    x = data(CLASSIFIER, 2, seed=7)
    latents = flow.forward(x)
    assert [z.shape for z in latents] == [(2, *s) for s in flow.latent_shapes()] == [(2, 2, 2, 12)]
    back, info = quick_jit(lambda flow, z: flow.inverse(z))(flow, latents)
    assert back.shape == x.shape and info.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-4)


def test_the_padded_network_has_no_log_det(variables):
    flow = flow_of(variables["classifier"])
    x = data(CLASSIFIER, 2, seed=7)
    for evaluate in (flow.forward_and_log_det, flow.log_prob):
        with pytest.raises(ValueError, match=r"1 padded channels.*no log-determinant"):
            evaluate(x, Exact())
