"""One small flow for all adapters: two blocks in the plane whose constraints are active."""

import jax
import pytest

import iresnet_jax as ir


@pytest.fixture(scope="session")
def x():
    return 1.0 + 0.5 * jax.random.normal(jax.random.key(0), (64, 2))


@pytest.fixture(scope="session")
def model():
    return ir.nn.VectorFlow(dim=2, depth=2, features=(8,), coeff=0.8, activation="sin")


@pytest.fixture(scope="session")
def variables(model, x):
    start = jax.jit(model.init)(jax.random.key(1), x)
    large = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 4.0 * leaf if "kernel" in str(path) else leaf, start["params"]
    )
    return ir.nn.shrink(model, ir.nn.converge(model, {**start, "params": large}))


@pytest.fixture(scope="session")
def flow(model, variables):
    return model.flow(variables)


@pytest.fixture(scope="session")
def bounded_model(model):
    """Whose constraint needs no state."""
    return model.clone(normalize="bound")
