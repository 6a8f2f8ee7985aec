"""What is tested of somebody else's Flax networks: layers and stacks that a transform repeats."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from cases import quick_jit

import iresnet_jax as ir

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 3))


def blocks(name, **options):
    return ir.nn.Stack(ir.nn.dense_branch(3, (4,)), 2, name=name, **options)


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return ir.nn.SpectralDense(3, name="mix")(blocks("stack")(x)), None


class Repeated(nn.Module):
    """Three cells in a row, or side by side, by a lifted transform of these collections."""

    lift: str
    collections: tuple[str, ...] = ("params", "spectral", "intermediates")
    axes: tuple[int | None, ...] = (0, 0, 0)

    @nn.compact
    def __call__(self, x):
        options = {
            "variable_axes": dict(zip(self.collections, self.axes, strict=False)),
            "split_rngs": {"params": self.axes[0] is not None},
        }
        if self.lift == "scan":
            return nn.scan(Cell, length=3, **options)(name="cells")(x, None)[0]
        cells = nn.vmap(Cell, in_axes=(None, None), axis_size=3, **options)(name="cells")
        return cells(x, None)[0].mean(0)


@functools.cache
def _initial(model):
    return quick_jit(model.init)(KEY, X)


def initial(model):
    """Fresh variables, whose dictionaries are the caller's own."""
    return jax.tree.map(lambda leaf: leaf, _initial(model))


def moved(model):
    """Variables as after training that let no power iteration advance."""
    variables = initial(model)
    rng = np.random.default_rng(3)

    def move(path, leaf):
        kernel = "kernel" in jax.tree_util.keystr(path)
        return leaf + jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if kernel else leaf

    return {**variables, "params": jax.tree_util.tree_map_with_path(move, variables["params"])}
