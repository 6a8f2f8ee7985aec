"""A model in one file: bit for bit, from the Hub too."""

import dataclasses
import functools
import http.server
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saving_cases import KEY, X, at_classes, at_vectors, images, learned_noise, vectors

import iresnet_jax as ir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    ir.save(path, vectors())
    return path


def test_a_model_loads_inside_of_a_trace(saved):
    held = []
    jax.jit(lambda x: (held.append(ir.load(saved)), x)[1])(1.0)
    (loaded,), outside = held, ir.load(saved)
    pairs = zip(jax.tree.leaves(loaded.flow), jax.tree.leaves(outside.flow), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "make",
    [
        vectors,
        functools.partial(vectors, mixing=True, actnorm=False, activation="learned_lipswish"),
        slow(functools.partial(vectors, activation="learned_elu")),
        slow(functools.partial(vectors, make_branch=ir.nn.monlip_branch)),
        slow(functools.partial(vectors, make_branch=ir.nn.shallow_monlip_branch)),
        slow(functools.partial(vectors, make_branch=ir.nn.concatenation_branch)),
        slow(functools.partial(images, depths=(1, 1))),
        at_vectors,
        slow(at_classes),
        learned_noise,
    ],
    ids=[
        *(
            "vectors",
            "settings",
            "learned lengths",
            "monlip",
            "shallow monlip",
            "concatenation",
            "images",
        ),
        *("at vectors", "at classes", "learned noise"),
    ],
)
def test_what_is_loaded_is_what_was_saved(make, tmp_path):
    fitted, path = make(), tmp_path / "model.safetensors"
    ir.save(path, fitted)
    loaded = ir.load(str(path))
    assert loaded.model == fitted.model and type(loaded) is type(fitted)
    assert (loaded.num_levels, loaded.about) == (fitted.num_levels, fitted.about)
    assert loaded.card == fitted.card
    pairs = zip(jax.tree.leaves(fitted.flow), jax.tree.leaves(loaded.flow), strict=True)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert jax.tree.structure(loaded.flow) == jax.tree.structure(fitted.flow)
    assert (loaded.dequantizer is None) == (fitted.dequantizer is None)
    if fitted.dequantizer is not None:
        assert loaded.dequantizer.module == fitted.dequantizer.module
        trees = (dequantizer.variables for dequantizer in (fitted.dequantizer, loaded.dequantizer))
        jax.tree.map(np.testing.assert_array_equal, *trees)
    assert loaded.certificate.certified
    assert loaded.certificate.lipschitz == fitted.certificate.lipschitz
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_that_was_trained_over_devices_is_saved(tmp_path):
    """Its ``axis_name`` names an axis that neither save nor load maps."""
    trained, path = vectors(), tmp_path / "model.safetensors"
    model = trained.model.clone(axis_name="batch")
    ir.save(path, dataclasses.replace(trained, model=model))
    loaded = ir.load(path)
    assert loaded.model == model
    np.testing.assert_array_equal(loaded.log_prob(X[:3]), trained.log_prob(X[:3]))


def test_arrays_in_any_order_are_saved(tmp_path):
    fitted = vectors()
    turned = jax.tree.map(np.asfortranarray, fitted.variables)
    ir.save(tmp_path / "model", ir.Fitted(fitted.model, turned))
    pairs = zip(*map(jax.tree.leaves, (ir.load(tmp_path / "model").variables, turned)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_an_uncertified_model_says_so(tmp_path):
    model = ir.nn.VectorFlow(dim=2, depth=1, features=(6,), coeff=None)
    variables = jax.jit(model.init)(KEY, X)
    variables = jax.tree.map(lambda leaf: 5.0 * leaf, variables)
    ir.save(tmp_path / "model", ir.Fitted(model, variables))
    assert not ir.load(tmp_path / "model").certificate.certified


def test_what_a_file_does_not_hold_is_refused(tmp_path):
    class Own(ir.nn.VectorFlow, kw_only=True):
        pass

    own = Own(dim=2, depth=1, features=(6,))
    with pytest.raises(ValueError, match=r"save knows the models VectorFlow, .*; got Own"):
        ir.save(tmp_path / "model", ir.Fitted(own, jax.jit(own.init)(KEY, X)))

    def branch(*arguments, **options):
        return ir.nn.dense_branch(*arguments, **options)

    with pytest.raises(ValueError, match="save knows the branches"):
        ir.save(tmp_path / "model", vectors(make_branch=branch))
    fitted = vectors()
    other = ir.Fitted(fitted.model, fitted.variables, (ir.Pad(0),))
    with pytest.raises(ValueError, match="ActNorm and Asinh before a model; got Pad"):
        ir.save(tmp_path / "model", other)
    with pytest.raises(TypeError, match="save takes what fit returned"):
        ir.save(tmp_path / "model", fitted.flow)
    surplus = {**fitted.variables, "other": {"a": jnp.ones(2)}}
    with pytest.raises(ValueError, match="they hold variables/other/a"):
        ir.save(tmp_path / "model", ir.Fitted(fitted.model, surplus))
    with pytest.raises(TypeError, match="about must be what JSON holds"):
        ir.save(tmp_path / "model", dataclasses.replace(fitted, about={"a": np.float32(1.0)}))
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        ir.save(tmp_path / "nowhere" / "model", fitted)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    with pytest.raises(OSError, match="model"):
        ir.save(tmp_path / "model", fitted)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("address", ["hf://name", "hf://a/b/c", "hf:///b"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match="hf://org/name"):
        ir.load(address)


class Hub(http.server.BaseHTTPRequestHandler):
    """What the Hub answers for one file of one repository."""

    file: bytes

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if self.path.split("?")[0] != "/org/name/resolve/v1/model.safetensors":
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1234"')
        self.send_header("Content-Length", str(len(self.file)))
        self.end_headers()
        if body:
            self.wfile.write(self.file)

    def log_message(self, *arguments):
        pass


def test_a_model_is_loaded_from_the_hub(saved, tmp_path):
    """By the real huggingface_hub, from a server on this machine; in a process of its own."""
    pytest.importorskip("huggingface_hub")
    handler = type("Handler", (Hub,), {"file": saved.read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import iresnet_jax as ir; m = ir.load('hf://org/name@v1'); "
        "print(m.certificate.certified, m.about['data'])"
    )
    changes = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
    }
    try:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | changes,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert run.stdout.split() == ["True", "noise"], run.stderr
