"""State dicts of residual flows, against an evaluation of the same weights in NumPy, float64.

The layouts are those of the published modules; weights are random, with vectors that have advanced
a few steps, so that every constraint is active and none is exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.interop.residual_flows import Flatten, SqueezeByChannel, flow_from_residual_flows

COEFF = 0.9
RNG = np.random.default_rng


# The network in NumPy: images are [channels, height, width].


def convolve(x, kernel):
    height, width = kernel.shape[2:]
    padded = np.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows, kernel)


def swish(x, beta):
    return x / (1 + np.exp(-x * np.log1p(np.exp(beta)))) / 1.1


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def apply_layer(state, name, x):
    weight, u, v = (np.float64(state[f"{name}.{key}"]) for key in ("weight", "u", "v"))
    if weight.ndim == 2 or weight.shape[2:] == (1, 1):
        image = weight.reshape(weight.shape[:2]) @ v
    else:
        image = convolve(v.reshape(-1, *x.shape[1:]), weight).ravel()
    weight = weight / max(1.0, u @ image / COEFF)
    bias = np.float64(state[f"{name}.bias"])
    return weight @ x + bias if weight.ndim == 2 else convolve(x, weight) + bias[:, None, None]


def evaluate_branch(state, prefix, x, length):
    for index in range(length):
        name = f"{prefix}.{index}"
        if f"{name}.beta" in state:
            x = swish(x, np.float64(state[f"{name}.beta"]))
        elif f"{name}.weight" in state:
            x = apply_layer(state, name, x)
        else:
            x = elu(x)
    return x


def evaluate_chain(state, chain, x):
    for name, kind in chain:
        if kind == "actnorm":
            weight, bias = (np.float64(state[f"{name}.{key}"]) for key in ("weight", "bias"))
            shape = (-1, *(1,) * (x.ndim - 1))
            x = (x + bias.reshape(shape)) * np.exp(weight.reshape(shape))
        elif kind == "squeeze":
            c, h, w = x.shape
            x = x.reshape(c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3)
            x = x.reshape(4 * c, h // 2, w // 2)
        elif kind == "flatten":
            x = x.ravel()
        elif kind == "logit":
            p = 0.05 + 0.9 * x
            x = np.log(p) - np.log1p(-p)
        else:
            x = x + evaluate_branch(state, name, x, kind)
    return x


# State dicts


def add_layer(state, rng, name, shape, image_shape=None):
    """Weights of norms above the constraint."""
    weight = rng.normal(size=shape) * 1.5 / np.sqrt(np.prod(shape[1:]))
    state[f"{name}.weight"], state[f"{name}.bias"] = weight, 0.3 * rng.normal(size=shape[0])
    pixels = 1 if image_shape is None or shape[2:] == (1, 1) else np.prod(image_shape)
    for key, size in (("u", shape[0] * pixels), ("v", shape[1] * pixels)):
        vector = rng.normal(size=size)
        state[f"{name}.{key}"] = vector / np.linalg.norm(vector)
    flat = state[f"{name}.v"]
    if pixels == 1:
        image = weight.reshape(shape[:2]) @ flat
    else:
        image = convolve(flat.reshape(shape[1], *image_shape), weight).ravel()
    state[f"{name}.u"] = image / np.linalg.norm(image)
    state[f"{name}.scale"] = np.float64(state[f"{name}.u"] @ image)


def add_actnorm(state, rng, name, channels):
    state[f"{name}.weight"], state[f"{name}.bias"] = 0.3 * rng.normal(size=(2, channels))
    state[f"{name}.initialized"] = np.int64(1)


def add_branch(state, rng, prefix, shape, widths, kernels, *, acts_first, swishes=True):
    """Return the number of modules."""
    index, channels = 0, shape[0]
    for i, (width, size) in enumerate(zip((*widths, shape[0]), kernels, strict=True)):
        if i or acts_first:
            if swishes:
                state[f"{prefix}.{index}.beta"] = rng.normal(size=1)
            index += 1
        whole = (width, channels, size, size) if len(shape) == 3 else (width, channels)
        add_layer(state, rng, f"{prefix}.{index}", whole, shape[1:] or None)
        index, channels = index + 1, width
    return index


def add_estimator(state, block):
    state |= {f"{block}.{key}": np.zeros(()) for key in ("geom_p", "lamb")}
    state |= {f"{block}.last_{key}": np.zeros(1) for key in ("n_samples", "firmom", "secmom")}


def image_state(factor_out, *, dense_end=True):
    """A logit, two scales of two blocks on images 4×6 of one channel, then a dense block."""
    rng, state, chains, shape = RNG(0), {}, [], (1, 4, 6)
    for scale in range(2):
        prefix, index, chain = f"transforms.{scale}.chain", 0, []
        if scale == 0:
            chain += [("", "logit"), (f"{prefix}.1", "actnorm")]
            add_actnorm(state, rng, f"{prefix}.1", shape[0])
            index = 2
        for i in range(2):
            block, first = f"{prefix}.{index}", scale == 0 and i == 0
            length = add_branch(
                state, rng, f"{block}.nnet", shape, (5, 4), (3, 1, 3), acts_first=not first
            )
            add_estimator(state, block)
            add_actnorm(state, rng, f"{prefix}.{index + 1}", shape[0])
            chain += [(f"{block}.nnet", length), (f"{prefix}.{index + 1}", "actnorm")]
            index += 2
        if scale == 0:
            chain.append(("", "squeeze"))
            shape = (shape[0] * (2 if factor_out else 4), shape[1] // 2, shape[2] // 2)
        chains.append(chain)
    if dense_end:
        dim, block = int(np.prod(shape)), f"{prefix}.{index}"
        length = add_branch(
            state, rng, f"{block}.nnet.nnet", (dim,), (7, 6), (1, 1, 1), acts_first=True
        )
        add_estimator(state, block)
        after = f"{prefix}.{index + 1}.fc_module"
        add_actnorm(state, rng, after, dim)
        chains[-1] += [("", "flatten"), (f"{block}.nnet.nnet", length), (after, "actnorm")]
    return {name: np.asarray(x, np.float32) for name, x in state.items()}, chains


def evaluate_images(state, chains, x, factor_out):
    """Latents of one image [channels, height, width]."""
    first = evaluate_chain(state, chains[0], x)
    if not factor_out:
        return [evaluate_chain(state, chains[1], first)]
    kept, leaving = np.split(first, 2)
    return [leaving, evaluate_chain(state, chains[1], kept)]


def vector_state():
    rng, state, chain = RNG(1), {}, []
    add_actnorm(state, rng, "chain.0", 3)
    for index in (1, 3, 5):
        length = add_branch(
            state, rng, f"chain.{index}.nnet", (3,), (6, 5), (1, 1, 1), acts_first=True,
            swishes=False,
        )  # fmt: skip
        add_estimator(state, f"chain.{index}")
        add_actnorm(state, rng, f"chain.{index + 1}", 3)
        chain += [(f"chain.{index}.nnet", length), (f"chain.{index + 1}", "actnorm")]
    chain = [("chain.0", "actnorm"), *chain]
    return {name: np.asarray(x, np.float32) for name, x in state.items()}, chain


def jacobian(function, x):
    """By central differences in float64."""
    step, flat = 1e-6, x.ravel()
    columns = []
    for i in range(flat.size):
        ends = [function((flat + s * np.eye(flat.size)[i]).reshape(x.shape)) for s in (step, -step)]
        columns.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("factor_out", [pytest.param(False, marks=pytest.mark.slow), True])
def test_images_give_their_latents_and_likelihood(factor_out):
    state, chains = image_state(factor_out)
    x = RNG(2).uniform(size=(1, 4, 6))
    flow = flow_from_residual_flows(state, (4, 6, 1), COEFF, logit_alpha=0.05)
    own = jnp.asarray(np.moveaxis(x, 0, -1), jnp.float32)
    latents, own_log_prob = jax.jit(lambda flow, x: (flow.forward(x), flow.log_prob(x)))(flow, own)
    expected = evaluate_images(state, chains, x, factor_out)
    assert len(latents) == len(expected)
    for z, theirs in zip(latents, expected, strict=True):
        theirs = np.moveaxis(theirs, 0, -1) if theirs.ndim == 3 else theirs
        np.testing.assert_allclose(z, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    def all_latents(x):
        return np.concatenate([z.ravel() for z in evaluate_images(state, chains, x, factor_out)])

    z, (_, log_det) = all_latents(x), np.linalg.slogdet(jacobian(all_latents, x))
    log_prob = log_det - 0.5 * z @ z - 0.5 * z.size * np.log(2 * np.pi)
    np.testing.assert_allclose(own_log_prob, log_prob, rtol=1e-5)
    certificate = ir.certify(flow)
    assert len(certificate.blocks) == 5 and np.isfinite(certificate.forward)


def test_vectors_give_their_latents():
    state, chain = vector_state()
    x = RNG(3).normal(size=(4, 3))
    flow = flow_from_residual_flows(state, (3,), COEFF)
    expected = np.stack([evaluate_chain(state, chain, row) for row in x])
    np.testing.assert_allclose(flow.forward(jnp.asarray(x, jnp.float32))[0], expected, atol=1e-5)


def test_what_is_not_certified_is_within_a_smaller_norm():
    """Vectors that see less than the norm leave layers above 1; ``max_norm`` scales them."""
    state, _ = vector_state()
    for name in [name for name in state if name.endswith(".weight") and state[name].ndim == 2]:
        state[name] = 3 * state[name]
        state[name.replace("weight", "u")] = 0 * state[name.replace("weight", "u")]  # sees nothing
    loose = ir.certify(flow_from_residual_flows(state, (3,), COEFF))
    assert not loose.certified and len(loose.failures) == 3
    tight = flow_from_residual_flows(state, (3,), COEFF, max_norm=0.9)
    certificate = ir.certify(tight)
    assert certificate.certified
    assert max(layer.upper_bound for block in certificate.blocks for layer in block.layers) <= 0.9
    x = jnp.asarray(RNG(4).normal(size=(2, 3)), jnp.float32)
    back, info = tight.inverse(tight.forward(x))
    assert info.converged.all()
    np.testing.assert_allclose(back, x, atol=1e-4)


def test_reordered_images_come_back():
    x = jnp.asarray(RNG(5).normal(size=(2, 4, 6, 3)), jnp.float32)
    for link in (SqueezeByChannel(), SqueezeByChannel(True), Flatten((4, 6, 3))):
        y = link.forward(x)
        assert y.shape[1:] == link.out_shape((4, 6, 3))
        np.testing.assert_array_equal(link.backward(y), x)


def test_what_is_refused_names_the_key():
    state, _ = image_state(False)

    def refused(message, changed, shape=(4, 6, 1), error=ValueError, **options):
        options = {"logit_alpha": 0.05, **options}
        with pytest.raises(error, match=message):
            flow_from_residual_flows(changed, shape, COEFF, **options)

    layer = "transforms.0.chain.2.nnet.0"
    without = lambda name: {key: x for key, x in state.items() if key != name}  # noqa: E731
    refused(r"lacks transforms.0.chain.2.nnet.0.u\.", without(f"{layer}.u"))
    refused(r"lacks transforms.0.chain.1.bias", without("transforms.0.chain.1.bias"))
    refused("not read here: logit_layer.weight", state | {"logit_layer.weight": np.ones((2, 2))})
    refused("not finite for .*nnet.0.bias", state | {f"{layer}.bias": np.full(5, np.nan)})
    refused(r"nnet.0.bias must have shape \(5,\)", state | {f"{layer}.bias": np.ones(4)})
    refused("vectors of .*nnet.0, of 7 and", state | {f"{layer}.u": np.ones(7)})
    refused("nnet.0.weight .* does not fit", state | {f"{layer}.weight": np.ones((5, 3, 3, 3))})
    refused("not initialised", state | {"transforms.0.chain.1.initialized": np.int64(0)})
    refused("chain.0. If that is their LogitTransform", state, logit_alpha=None)
    last = "transforms.0.chain.2.nnet.4."
    moved = {name.replace(last, last.replace("4", "5")): x for name, x in state.items()}
    refused("Two modules in a row before transforms.0.chain.2.nnet.5", moved)
    refused("is of images .* got event_shape", state, shape=(48,))
    refused("no array of numbers", state | {"a": np.array("b")}, error=TypeError)
    refused("maps names to arrays", [1], error=TypeError)
    refused("coeff", state, max_norm=1.5)
    refused(f"lacks {layer}.bias", without(f"{layer}.bias"))
    refused("holds .*chain.1.bias twice", state | {"module.transforms.0.chain.1.bias": np.ones(1)})
    huge = {"transforms.0.chain.1.bias": np.full(1, 1e300)}
    refused("not finite for transforms.0.chain.1.bias", state | huge)
    norm = without("transforms.0.chain.1.initialized")
    norm = {key.replace("chain.1.weight", "chain.1.std"): x for key, x in norm.items()}
    norm = {key.replace("chain.1.bias", "chain.1.mean"): x for key, x in norm.items()}
    refused("chain.1.std must be > 0", norm | {"transforms.0.chain.1.std": np.zeros(1)})


def test_half_precision_is_read_as_single():
    """Their numbers, and no arithmetic in float16."""
    state, chain = vector_state()
    half = {name: x.astype(np.float16) if x.dtype.kind == "f" else x for name, x in state.items()}
    x = RNG(3).normal(size=(2, 3))
    flow = flow_from_residual_flows(half, (3,), COEFF)
    expected = np.stack([evaluate_chain(half, chain, row) for row in x])
    np.testing.assert_allclose(flow.forward(jnp.asarray(x, jnp.float32))[0], expected, atol=1e-5)
