"""The same weights give the same numbers as the authors' PyTorch code.

Every layer's constraint is applied here, by this library, from the raw kernel and the recorded
singular vectors; from there on a record's network is run forward, its log-determinants estimated
with the recorded probes, and inverted. The tolerances are the project's promise: not to be widened.
"""

import functools
import math
from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import actnorm_of, links_of, quick_jit, residual_of, walk
from helpers import Geometry, dense_matrix

from iresnet_jax import (
    Exact,
    conv_operator,
    layer_upper_bound,
    power_iteration_to_tolerance,
    series_along_probe,
    sigma_estimate,
    spectral_normalize,
)
from iresnet_jax.nn import ImageFlow, InvertibleClassifier
from iresnet_jax.nn.classifier import Head

pytestmark = pytest.mark.skipif(
    golden.golden_dir() is None,
    reason=f"no golden records: neither ${golden.VARIABLE} nor ../shared/data/golden is a folder",
)

DENSITY = ["density_single", "density_multiscale"]
CLASSIFIER = ["classifier_injective"]
#: The one with most parts: several scales, channels that leave, ActNorm, 1×1 and 3×3 kernels.
TELLING, REST = ["density_multiscale"], ["density_single", "classifier_injective"]

RECORDS = {name: golden.Record(name) for name in golden.ARCHITECTURES}


def records(*names, slow=()):
    marks = {name: [] for name in names} | {name: pytest.mark.slow for name in slow}
    params = [pytest.param(RECORDS[name], id=name, marks=m) for name, m in marks.items()]
    return pytest.mark.parametrize("record", params)


def all_layers(record):
    return [layer for i in range(record.num_blocks) for layer in record.layers(i)]


@functools.cache
def flow_of(name):
    return RECORDS[name].flow()


def norm_of(geometry, kernel):
    """The largest singular value, from the smaller Gram matrix, in float64."""
    matrix = dense_matrix(geometry, kernel)
    rows, columns = matrix.shape
    matrix = matrix if rows < columns else matrix.T
    return math.sqrt(np.linalg.eigvalsh(matrix @ matrix.T)[-1])


@records("density_single")
def test_the_bounds_of_trained_kernels_are_above_their_norms(record):
    """On images of 8×8 and 4×4, whichever matrices the bound is of (1e-12: of the oracle)."""
    for i in range(record.num_blocks):
        side = record[f"block{i}/branch_input"].shape[-1]
        for layer in record.layers(i):
            kernel = np.asarray(layer.kernel)
            truth = norm_of(Geometry((side, side), kernel.shape[:2], kernel.shape[2:]), kernel)
            operator = conv_operator(kernel, (side, side))
            circular = layer_upper_bound(operator, max_dense_size=0)
            assert truth * (1 - 1e-12) <= layer_upper_bound(operator) <= truth * (1 + 1e-9)
            assert circular >= truth * (1 - 1e-12), layer.name


@quick_jit
def run(flow, x):
    """What every block's branch receives and returns, and the latents."""
    walked = walk(flow, x)
    pairs = zip(walked.blocks, walked.inputs, strict=True)
    outputs = [residual_of(block).branch(h) for block, h in pairs]
    return walked.inputs, outputs, walked.latents


@functools.cache
def walk_of(name):
    return run(flow_of(name), RECORDS[name].images("x"))


def largest_difference(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


# Spectral normalisation

converge = quick_jit(partial(power_iteration_to_tolerance, rtol=1e-3, max_steps=2000))
norm_estimate = quick_jit(sigma_estimate)


@records(*TELLING, slow=REST)
def test_norm_estimates_equal_the_recorded_ones(record):
    """σ = u·Wv on the image on which the authors' power iteration ran.

    In blocks with stride 2 that is the image before the squeeze: the operator whose σ divides the
    kernel (``Layer.measured_operator``) is larger than the one that the network applies.
    """
    for layer in all_layers(record):
        sigma = norm_estimate(layer.measured_operator, layer.vectors)
        np.testing.assert_allclose(sigma, layer.sigma, rtol=1e-6, err_msg=layer.name)


@records(*TELLING, slow=REST)
def test_normalised_kernels_equal_the_recorded_ones(record):
    """W·min(1, c/σ) against the authors' W / (max(1, σ/c) + 1e-5) for 3×3 (for 1×1 without 1e-5).

    σ comes from the recorded vectors. Theirs lag behind the norm (see the next test), so with
    converged vectors the kernels would be smaller than what their network used.
    """
    for layer in all_layers(record):
        ours, theirs = layer.normalized_here(), layer.kernel_normalized
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=layer.name)
        gap = jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel())
        one_by_one = layer.kernel.shape[:2] == (1, 1)
        assert gap <= (1e-6 if one_by_one else 1e-5), f"{layer.name}: {gap}"


@records(*TELLING, slow=REST)
def test_converged_power_iteration_meets_the_recorded_kernels_where_theirs_converged(record):
    """Power iteration run on from the recorded vectors: a check of the norm itself.

    The authors ran few steps a batch for 25 batches, and their vectors are older than the kernels:
    their σ is below the norm in every layer, by up to 10%. Ours, converged, lies between theirs and
    the rigorous bound. Where theirs is within 3e-4 of ours, the kernels agree to the promised 1e-4;
    the others cannot, whatever the tolerance of our iteration. Of the classifier, the slowest, a
    block at each resolution.
    """
    num_agreeing = 0
    blocks = range(record.num_blocks) if record.name in DENSITY else (0, 3, 5)
    for layer in (layer for block in blocks for layer in record.layers(block)):
        operator = layer.measured_operator
        vectors, info = converge(operator, layer.vectors)
        sigma = float(norm_estimate(operator, vectors))
        assert info.converged, layer.name
        rounding = 1e-6  # of σ in float32
        assert sigma >= layer.sigma * (1 - rounding), layer.name
        assert sigma <= layer_upper_bound(operator) * (1 + rounding), layer.name
        assert sigma <= 1.11 * layer.sigma, layer.name
        if sigma <= layer.sigma * (1 + 3e-4):
            num_agreeing += 1
            ours = spectral_normalize(operator, jnp.float32(sigma), golden.COEFF).kernel
            ours = ours.reshape(layer.kernel.shape)
            np.testing.assert_allclose(ours, layer.kernel_normalized, rtol=0, atol=1e-4)
    assert num_agreeing >= 1


# The map


@records(*TELLING, slow=REST)
def test_branch_outputs(record):
    run = quick_jit(lambda branch, h: branch(h))
    for i, block in enumerate(flow_of(record.name).blocks()):
        output = run(residual_of(block).branch, record.images(f"block{i}/branch_input"))
        expected = record.images(f"block{i}/branch_output")
        error = largest_difference(output, expected)
        assert error <= 1e-4, f"block {i}: {error}"
        assert error <= 1e-4 * float(jnp.max(jnp.abs(expected))), f"block {i}: {error}"


@records(*TELLING, slow=REST)
def test_squeeze_and_actnorm_give_every_branch_its_recorded_input(record):
    inputs, outputs, _ = walk_of(record.name)
    assert len(inputs) == record.num_blocks
    for i, (h, g) in enumerate(zip(inputs, outputs, strict=True)):
        assert largest_difference(h, record.images(f"block{i}/branch_input")) <= 1e-4
        assert largest_difference(g, record.images(f"block{i}/branch_output")) <= 1e-4


@records(*TELLING, *CLASSIFIER, slow=["density_single"])
def test_latents(record):
    flow = flow_of(record.name)
    latents = quick_jit(lambda flow, x: flow.forward(x))(flow, record.images("x"))
    assert tuple(z.shape[1:] for z in latents) == flow.latent_shapes()
    for ours, theirs in zip(latents, record.latents, strict=True):
        assert ours.shape == theirs.shape
        assert largest_difference(ours, theirs) <= 1e-3


@records("density_multiscale")
def test_the_first_half_of_the_channels_leaves_and_the_second_goes_on(record):
    flow = flow_of(record.name)
    after_scale = record.images("block1/branch_input") + record.images("block1/branch_output")
    channels = after_scale.shape[-1]
    leaving, staying = jnp.split(after_scale, 2, axis=-1)
    assert leaving.shape[-1] == channels // 2
    assert largest_difference(leaving, record.latents[0]) <= 1e-6
    squeeze = links_of(flow.levels[1])[0]
    next_input = record.actnorm(2).forward(squeeze.forward(staying))
    assert largest_difference(next_input, record.images("block2/branch_input")) <= 1e-5
    latents = quick_jit(lambda flow, x: flow.forward(x))(flow, record.images("x"))
    assert len(latents) == 2
    assert largest_difference(latents[0], leaving) <= 1e-5


@records(*TELLING, *CLASSIFIER, slow=["density_single"])
def test_inverse(record):
    invert = quick_jit(lambda flow, z: flow.inverse(z))
    x, info = invert(flow_of(record.name), record.latents)
    assert jnp.all(info.converged)
    assert largest_difference(x, record.images("x")) <= 1e-5
    assert largest_difference(x, record.images("x_inverse_100")) <= 1e-5


# Densities


@records(*TELLING, slow=["density_single"])
def test_log_det_estimates_along_the_recorded_probes(record):
    """Five terms of the series with the recorded Gaussian probe, plus ActNorm's terms."""
    inputs = walk_of(record.name)[0]

    @quick_jit
    def total(flow, inputs, probes):
        parts = []
        for block, h, v in zip(flow.blocks(), inputs, probes, strict=True):
            parts.append(series_along_probe(residual_of(block).branch, h, v, golden.NUM_TERMS)[1])
            parts.append(actnorm_of(block).forward_and_log_det(h, Exact())[1])
        return sum(parts)

    probes = [record.images(f"block{i}/probe") for i in range(record.num_blocks)]
    estimate = total(flow_of(record.name), inputs, probes)
    np.testing.assert_allclose(estimate, record["logdet_estimate"], rtol=1e-3)
    # ActNorm makes up most of the sum; without it the branches' own terms must agree as well.
    actnorm = sum(
        actnorm_of(block).forward_and_log_det(h, Exact())[1][0]
        for block, h in zip(flow_of(record.name).blocks(), inputs, strict=True)
    )
    own, recorded = estimate - actnorm, record["logdet_estimate"] - actnorm
    np.testing.assert_allclose(own, recorded, rtol=1e-3, atol=1e-3)


@records(*TELLING, slow=["density_single"])
def test_exact_log_dets(record):
    """Ours in float32 from kernels normalised here, theirs in float64 from the full Jacobian."""
    estimate = quick_jit(lambda branch, h: Exact()(branch, h)[1])
    for i, block in enumerate(flow_of(record.name).blocks()):
        log_det = estimate(residual_of(block).branch, record.images(f"block{i}/branch_input"))
        expected = record[f"block{i}/logdet_exact"]
        np.testing.assert_allclose(log_det, expected, rtol=1e-4, atol=1e-4, err_msg=f"block {i}")


@records(*TELLING, slow=["density_single"])
def test_prior_log_densities(record):
    ours = flow_of(record.name).prior_log_prob(walk_of(record.name)[2])
    np.testing.assert_allclose(ours, record["logpz"], rtol=1e-5)
    recorded_latents = flow_of(record.name).prior_log_prob(record.latents)
    np.testing.assert_allclose(recorded_latents, record["logpz"], rtol=1e-6)


# The classifier's head, and the Flax models


def head_variables(record):
    def take(key):
        return jnp.asarray(record[f"head/{key}"])

    return {
        "params": {
            "norm": {"scale": take("bn_weight"), "bias": take("bn_bias")},
            "linear": {"kernel": take("linear_weight").T, "bias": take("linear_bias")},
        },
        "batch_stats": {"norm": {"mean": take("bn_running_mean"), "var": take("bn_running_var")}},
    }


@records(*CLASSIFIER)
def test_classifier_logits(record):
    head, variables = Head(10), head_variables(record)
    for latents in (record.latents, walk_of(record.name)[2]):
        logits = head.apply(variables, latents[-1], train=False)
        assert largest_difference(logits, record["logits"]) <= 1e-3


def model_variables(model, record):
    """A Flax model's variables, filled with the record's weights.

    The model is unconstrained: the stride-2 blocks of the record were normalised at another
    resolution than the model would use, so it gets the kernels as the authors' network used them.
    """
    image = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params, index = variables["params"], 0
    for i in range(len(model.depths)):
        stack = params[f"scale{i}_blocks"]
        depth = stack["shift"].shape[0]
        own = range(index, index + depth)
        index += depth
        norms = [record.actnorm(k) for k in own]
        layers = [record.layers(k) for k in own]
        stack["log_scale"] = jnp.stack([norm.log_scale for norm in norms])
        stack["shift"] = jnp.stack([norm.shift for norm in norms])
        stages = stack["branch"]
        assert len(stages) == 3
        for j, stage in enumerate(sorted(stages)):
            stages[stage] = {
                "kernel": jnp.stack([block[j].kernel_normalized for block in layers]),
                "bias": jnp.stack([block[j].bias for block in layers]),
            }
    assert index == record.num_blocks
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    return variables


@records(*TELLING, slow=["density_single"])
def test_image_flow_with_the_recorded_weights(record):
    architecture = record.architecture
    model = ImageFlow(
        image_shape=record.images("x").shape[1:],
        depths=architecture.depths,
        features=architecture.features,
        squeeze_first=architecture.squeeze_first,
        factor_out=architecture.factor_out,
        domain="real",
        coeff=None,
    )
    variables = model_variables(model, record)
    for i, prior in enumerate(record.flow().priors):
        variables["params"][f"prior_mean_{i}"] = prior.mean
        variables["params"][f"prior_log_std_{i}"] = prior.log_std
    flow = quick_jit(model.flow)(variables)
    latents = quick_jit(lambda flow, x: flow.forward(x))(flow, record.images("x"))
    for ours, theirs in zip(latents, record.latents, strict=True):
        assert largest_difference(ours, theirs) <= 1e-5
    np.testing.assert_allclose(flow.prior_log_prob(latents), record["logpz"], rtol=1e-5)
    assert flow.dim == math.prod(record["x"].shape[1:])


@records(slow=CLASSIFIER)
def test_classifier_with_the_recorded_weights(record):
    architecture = record.architecture
    model = InvertibleClassifier(
        image_shape=record.images("x").shape[1:],
        depths=architecture.depths,
        features=architecture.features,
        padding=architecture.padding,
        coeff=None,
    )
    variables = model_variables(model, record)
    head = head_variables(record)
    variables["params"]["head"] = head["params"]
    variables["batch_stats"]["head"] = head["batch_stats"]
    logits = quick_jit(model.apply)(variables, record.images("x"))
    assert largest_difference(logits, record["logits"]) <= 1e-4
    np.testing.assert_array_equal(jnp.argmax(logits, -1), np.argmax(record["logits"], -1))
