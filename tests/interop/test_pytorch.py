"""State dicts of the authors' code, with the golden records' weights under the authors' names."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.interop.pytorch import variables_from_pytorch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        golden.golden_dir() is None,
        reason=f"no golden records: neither ${golden.VARIABLE} nor ../shared/data/golden is there",
    ),
]

NAMES = ["density_single", "density_multiscale"]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def state_dict(record):
    """As PyTorch names what a record holds."""
    depths, multiscale = record.architecture.depths, record.architecture.factor_out
    places = [(scale, i) for scale, depth in enumerate(depths) for i in range(depth)]
    state = {"prior_mu": record["prior_mu"], "prior_logstd": record["prior_logstd"]}
    if "head/bn_weight" in record:
        state |= {f"bn1.{key}": record[f"head/bn_{key}"] for key in BATCH_NORM}
        state |= {f"logits.{key}": record[f"head/linear_{key}"] for key in ("weight", "bias")}
        state["bn1.num_batches_tracked"] = np.int64(25)
    for index, (scale, i) in enumerate(places):
        block = f"stack.{scale}.stack.{i}" if multiscale else f"stack.{index}"
        for key in ("log_scale", "shift"):
            state[f"{block}.actnorm._{key}"] = record[f"block{index}/actnorm/{key}"]
        first = int(record[f"block{index}/input_nonlinearity"])
        for j in range(3):
            layer, theirs = f"block{index}/conv{j}", f"{block}.bottleneck_block.{2 * j + first}"
            state[f"{theirs}.bias"] = record[f"{layer}/bias"]
            state[f"{theirs}.weight_orig"] = record[f"{layer}/kernel"]
            for key in ("u", "v", "sigma"):
                state[f"{theirs}.weight_{key}"] = record[f"{layer}/{key}"]
    return state


def model_of(record, **options):
    architecture = record.architecture
    return ir.nn.ImageFlow(
        image_shape=record.images("x").shape[1:],
        depths=architecture.depths,
        features=architecture.features,
        squeeze_first=architecture.squeeze_first,
        factor_out=architecture.factor_out,
        domain="real",
        **{"coeff": None, **options},
    )


def classifier_of(record, **options):
    architecture = record.architecture
    return ir.nn.InvertibleClassifier(
        image_shape=record.images("x").shape[1:],
        depths=architecture.depths,
        features=architecture.features,
        padding=architecture.padding,
        **{"coeff": None, **options},
    )


def initial(model, record):
    return jax.jit(model.init)(jax.random.key(0), record.images("x"))


def loaded_into(model, record):
    start = initial(model, record)
    return variables_from_pytorch(model, start, state_dict(record), golden.COEFF)


@pytest.fixture(scope="module", params=NAMES)
def record(request):
    return golden.Record(request.param)


@pytest.fixture(scope="module")
def loaded(record):
    model = model_of(record)
    variables = loaded_into(model, record)
    return model, variables


def test_the_network_computes_what_theirs_did(record, loaded):
    model, variables = loaded
    flow = model.flow(variables)
    latents = jax.jit(flow.forward)(record.images("x"))
    for own, theirs in zip(latents, record.latents, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(flow.prior_log_prob(latents), record["logpz"], rtol=1e-5)


def test_the_kernels_are_those_that_they_used(record, loaded):
    """Of the first block of every scale, against the recorded normalised ones."""
    params, index = loaded[1]["params"], 0
    for scale, depth in enumerate(record.architecture.depths):
        for j in range(3):
            own = params[f"scale{scale}_blocks"]["branch"][f"stages_{2 * j + 1}"]["kernel"][0]
            theirs = record[f"block{index}/conv{j}/kernel_normalized"].transpose(2, 3, 1, 0)
            np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-7)
        index += depth


def test_their_network_is_certified_as_it_is(record, loaded):
    """Though norms are above their coeff, which their lagging vectors did not see."""
    certificate = ir.certify(*loaded)
    layers = [layer for block in certificate.blocks for layer in block.layers]
    assert certificate.certified
    assert golden.COEFF * 1.01 < max(layer.sigma for layer in layers) < 1.0
    assert all(layer.sigma <= layer.upper_bound * (1 + 1e-6) for layer in layers)


def test_under_a_constraint_they_are_within_it():
    record = golden.Record("density_single")
    model = model_of(record, coeff=golden.COEFF)
    variables = loaded_into(model, record)
    certificate = ir.certify(model, ir.nn.shrink(model, ir.nn.converge(model, variables)))
    bounds = [layer.upper_bound for block in certificate.blocks for layer in block.layers]
    assert certificate.certified and max(bounds) <= golden.COEFF * (1 + 1e-5)


def test_a_first_block_with_an_activation_is_refused():
    """The model's first block has none: it would be another network."""
    record = golden.Record("density_single")
    model, state = model_of(record), state_dict(record)
    shapes = jax.eval_shape(model.init, jax.random.key(0), record.images("x"))
    for place in (4, 2, 0):
        own, other = (f"stack.0.bottleneck_block.{i}." for i in (place, place + 1))
        state = {name.replace(own, other): x for name, x in state.items()}
    with pytest.raises(ValueError, match=r"of stack.0 are its modules \[1, 3, 5\], where"):
        variables_from_pytorch(model, shapes, state, golden.COEFF)


def test_a_padded_classifier_gives_their_logits():
    record = golden.Record("classifier_injective")
    model = classifier_of(record)
    variables = loaded_into(model, record)
    x = record.images("x")
    logits = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(logits, record["logits"], rtol=0, atol=1e-4)
    (z,) = jax.jit(model.flow(variables).forward)(x)
    np.testing.assert_allclose(z, record.images("z0"), rtol=0, atol=1e-4)


def test_what_of_a_classifier_is_refused():
    record = golden.Record("classifier_injective")
    model, state = classifier_of(record), state_dict(record)
    variables = initial(model, record)

    def refused(message, state=state, model=model):
        with pytest.raises(ValueError, match=message):
            variables_from_pytorch(model, variables, state, 0.9)

    refused("squeezes before it pads; .* padding=5", model=model.clone(squeeze_first=True))
    refused("lacks bn1.running_var", {k: x for k, x in state.items() if k != "bn1.running_var"})
    refused("head/linear/kernel has shape", state | {"logits.weight": np.ones((9, 128))})
    refused("No classifier .* holds bn2.weight", state | {"bn2.weight": np.ones(3)})


def test_what_is_refused():
    record = golden.Record("density_single")
    model, state = model_of(record), state_dict(record)
    variables = initial(model, record)

    def refused(message, state=state, variables=variables, coeff=0.9, model=model):
        with pytest.raises(ValueError, match=message):
            variables_from_pytorch(model, variables, state, coeff)

    refused(r"No density model .* holds bn1.weight", state={**state, "bn1.weight": np.ones(3)})
    refused("coeff", coeff=1.5)
    less = {name: x for name, x in state.items() if "0.weight_u" not in name}
    refused(r"lacks bottleneck_block.0.weight_u of stack.0", state=less)
    nan = {**state, "stack.1.actnorm._shift": np.full(3, np.nan, np.float32)}
    refused(r"not finite for stack.1.actnorm._shift", state=nan)
    more = {name.replace("stack.3", "stack.9"): x for name, x in state.items() if "stack.3" in name}
    refused(r"more blocks than the model: stack.9", state=state | more)
    wide = model_of(record).clone(features=(16, 32))
    refused(
        r"scale1_blocks/branch/stages_1/bias has shape \(2, 32\)", variables=initial(wide, record)
    )


def test_the_names_of_several_devices(loaded, record):
    """DataParallel puts "module." in front."""
    model, expected = loaded
    state = {f"module.{name}": x for name, x in state_dict(record).items()}
    own = variables_from_pytorch(model, expected, state, golden.COEFF)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), own["params"], expected["params"])
    assert all(jax.tree.leaves(same))
