"""Models that files hold, and edits of those files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy as safetensors_numpy

import iresnet_jax as ir

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
TAILS = (
    ir.ActNorm(jnp.asarray([-3.0, 2.0]), jnp.asarray([0.5, -0.1])),
    ir.Asinh((False, True)),
)


@functools.cache
def vectors(**settings):
    model = ir.nn.VectorFlow(dim=2, depth=2, features=(6, 5), **settings)
    variables = jax.jit(model.init)(KEY, X)
    return ir.Fitted(model, variables, TAILS, about={"nats": 1.5, "data": "noise"})


@functools.cache
def images(depths=(1,)):
    model = ir.nn.ImageFlow(image_shape=(4, 4, 1), depths=depths, features=3, domain="logit")
    x = np.random.default_rng(1).uniform(size=(5, 4, 4, 1)).astype(np.float32)
    return ir.Fitted(model, jax.jit(model.init)(KEY, x), num_levels=17)


def conditional(entrance=(), **settings):
    model = ir.nn.ConditionalVectorFlow(dim=2, depth=2, features=(6,), **settings)
    variables = jax.jit(model.init)(KEY, X)
    return ir.FittedConditional(model, variables, TAILS, condition_entrance=entrance)


@functools.cache
def at_vectors():
    scale = ir.ActNorm(jnp.asarray([-1.0, 0.0, 2.0]), jnp.asarray([0.5, -0.1, 3.0]))
    return conditional((scale, ir.Asinh((True, False, False))), condition_dim=3)


@functools.cache
def at_classes():
    return conditional(num_classes=4)


@functools.cache
def learned_noise():
    module = ir.nn.VariationalDequantization(17, features=3, couplings=2)
    levels = np.zeros((1, 4, 4, 1), np.int32)
    return dataclasses.replace(
        images(), dequantizer=ir.Dequantizer(module, jax.jit(module.init)(KEY, levels, KEY))
    )


def edited(path, tmp_path, change):
    """A copy of a file, its tensors and metadata changed, and written as a valid file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    tensors = safetensors_numpy.load(content)
    change(tensors, metadata)
    target = tmp_path / "edited.safetensors"
    safetensors_numpy.save_file(tensors, target, metadata)
    return target


def resigned(change):
    """An edit that renews the digest, as someone who reads the source can."""

    def apply(tensors, metadata):
        change(tensors, metadata)
        stated = {name: value for name, value in metadata.items() if name != "digest"}
        metadata["digest"] = ir.saving._digest(tensors, stated)

    return apply
