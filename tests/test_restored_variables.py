"""Variables that common tools stored and restored, without a template: they work as they did.

Each tool turns the containers into others: named tuples into dicts, JAX's arrays into NumPy's.
"""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import iresnet_jax as ir
from iresnet_jax import nn

MODEL = nn.VectorFlow(dim=2, depth=2, features=(3,), coeff=0.8)
X = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


@functools.cache
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), X)


def by_msgpack(tree, folder):
    return serialization.msgpack_restore(serialization.to_bytes(tree))


def by_orbax(tree, folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved")


def _flat(tree):
    flat = flatten_dict(serialization.to_state_dict(tree), sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def by_npz(tree, folder):
    file = io.BytesIO()
    np.savez(file, **_flat(tree))
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        return unflatten_dict(dict(archive), sep="/")


def by_safetensors(tree, folder):
    tensors = pytest.importorskip("safetensors.numpy")
    return unflatten_dict(tensors.load(tensors.save(_flat(tree))), sep="/")


def by_leaves(tree, folder):
    """The leaves in a row, put back into the structure of a fresh model's variables."""
    leaves, file = jax.tree.leaves(tree), io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    like = jax.eval_shape(MODEL.init, jax.random.key(0), X)
    with np.load(file, allow_pickle=False) as archive:
        read = [archive[f"arr_{i}"] for i in range(len(leaves))]
    return jax.tree.unflatten(jax.tree.structure(like), read)


TOOLS = [
    by_msgpack,
    *(pytest.param(tool, marks=pytest.mark.slow) for tool in (by_orbax, by_npz)),
    *(pytest.param(tool, marks=pytest.mark.slow) for tool in (by_safetensors, by_leaves)),
]


@pytest.mark.parametrize("tool", TOOLS)
def test_restored_variables_work_as_they_did(tool, tmp_path):
    stored, restored = variables(), tool(variables(), tmp_path)
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored)):
        stored = jax.device_get(stored)  # what NumPy multiplies by itself, XLA may fuse
    flows = [MODEL.flow(v) for v in (stored, restored)]
    np.testing.assert_array_equal(*(flow.forward(X)[0] for flow in flows))
    certificates = [ir.certify(MODEL, v).as_dict() for v in (stored, restored)]
    assert certificates[0] == certificates[1]

    def loss(flow):
        return -jnp.mean(flow.log_prob(X, ir.Exact()))

    results = [nn.value_and_grad(MODEL, loss, v) for v in (stored, restored)]
    for ours, oracle in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(ours, oracle)
    for change in (nn.converge, nn.shrink):
        changed = [jax.tree.leaves(change(MODEL, v)) for v in (stored, restored)]
        for ours, oracle in zip(*changed, strict=True):
            np.testing.assert_array_equal(ours, oracle)


@pytest.mark.parametrize("broken", ["cut", "flat"])
def test_what_a_tool_spoilt_is_refused_in_a_sentence(broken):
    restored = by_msgpack(variables(), None)
    if broken == "cut":
        place = restored["spectral"]["scale0_blocks"]["branch"]["stages_1"]["vectors"]
        del place["u"]
    else:
        restored = _flat(restored)
    for call in (MODEL.flow, functools.partial(ir.certify, MODEL)):
        with pytest.raises((ValueError, TypeError), match=r"variables|vectors"):
            call(restored)
