"""A model in one file: bit for bit, checked on loading, from the Hub too."""

import dataclasses
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    variables = ir.nn.shrink(model, jax.jit(model.init)(KEY, X))
    return ir.Fitted(model, variables, TAILS, about={"nats": 1.5, "data": "noise"})


@functools.cache
def images():
    model = ir.nn.ImageFlow(image_shape=(4, 4, 1), depths=(1, 1), features=(3, 4), domain="logit")
    x = np.random.default_rng(1).uniform(size=(5, 4, 4, 1)).astype(np.float32)
    return ir.Fitted(model, ir.nn.shrink(model, jax.jit(model.init)(KEY, x)), num_levels=17)


def conditional(entrance=(), **settings):
    model = ir.nn.ConditionalVectorFlow(dim=2, depth=2, features=(6,), **settings)
    variables = ir.nn.shrink(model, jax.jit(model.init)(KEY, X))
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    ir.save(path, vectors())
    return path


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


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


@pytest.mark.parametrize(
    "make",
    [
        vectors,
        functools.partial(vectors, mixing=True, actnorm=False, activation="learned_lipswish"),
        functools.partial(vectors, make_branch=ir.nn.monlip_branch),
        slow(functools.partial(vectors, make_branch=ir.nn.shallow_monlip_branch)),
        slow(functools.partial(vectors, make_branch=ir.nn.concatenation_branch)),
        slow(images),
        at_vectors,
        slow(at_classes),
        learned_noise,
    ],
    ids=[
        *("vectors", "settings", "monlip", "shallow monlip", "concatenation", "images"),
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


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([{"class": "ActNorm"}, {"class": "Asinh", "columns": [True]}], "model of 3 channels"),
        ([{"class": "Asinh", "columns": [True] * 3}] * 2, "with .*log_scale"),
        (None, "condition_entrance"),
        ([], "condition_entrance/0/log_scale, which is of nothing"),
    ],
)
def test_what_a_condition_passes_is_checked(tmp_path, value, told):
    def change(tensors, metadata):
        metadata.pop("condition_entrance")
        if value is not None:
            metadata["condition_entrance"] = json.dumps(value)

    path = tmp_path / "model.safetensors"
    ir.save(path, at_vectors())
    with pytest.raises(ValueError, match=f"describes no model of this version: .*{told}"):
        ir.load(edited(path, tmp_path, resigned(change)))


def test_a_model_that_was_trained_over_devices_is_saved(tmp_path):
    """Its ``axis_name`` names an axis that neither save nor load maps."""
    trained, path = vectors(), tmp_path / "model.safetensors"
    model = trained.model.clone(axis_name="batch")
    ir.save(path, dataclasses.replace(trained, model=model))
    loaded = ir.load(path)
    assert loaded.model == model
    np.testing.assert_array_equal(loaded.log_prob(X[:3]), trained.log_prob(X[:3]))


def test_classes_pass_nothing(tmp_path):
    def change(tensors, metadata):
        metadata["condition_entrance"] = json.dumps([{"class": "Asinh", "columns": []}])

    path = tmp_path / "model.safetensors"
    ir.save(path, at_classes())
    with pytest.raises(ValueError, match="Classes pass no condition_entrance"):
        ir.load(edited(path, tmp_path, resigned(change)))


def test_every_flipped_byte_is_seen(saved, tmp_path):
    """Anywhere in the file: it is refused, never loaded as something else."""
    content = saved.read_bytes()
    target = tmp_path / "flipped.safetensors"
    for place in np.random.default_rng(0).integers(0, len(content), 60):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(place) % 8
        target.write_bytes(bytes(flipped))
        with pytest.raises(ValueError, match=r"damaged|has format|no file of"):
            ir.load(target)


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_a_file_cut_short_is_refused(saved, tmp_path, kept):
    target = tmp_path / "cut.safetensors"
    target.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged"):
        ir.load(target)


def test_edited_weights_are_refused(saved, tmp_path):
    def change(tensors, metadata):
        tensors["entrance/0/shift"] *= np.float32(1.001)

    with pytest.raises(ValueError, match="damaged or was edited"):
        ir.load(edited(saved, tmp_path, change))


def resigned(change):
    """An edit that renews the digest, as someone who reads the source can."""

    def apply(tensors, metadata):
        change(tensors, metadata)
        stated = {name: value for name, value in metadata.items() if name != "digest"}
        metadata["digest"] = ir.saving._digest(tensors, stated)

    return apply


def test_a_certificate_of_other_weights_is_refused(saved, tmp_path):
    """Even in a file that is whole: the bounds are proved anew of the weights in it."""

    def larger(tensors, metadata):
        settings = json.loads(metadata["model"])
        settings["settings"]["coeff"] = None
        metadata["model"] = json.dumps(settings)
        for name in tensors:
            if name.endswith("kernel"):
                tensors[name] *= np.float32(9.0)

    def tighter(tensors, metadata):
        stated = json.loads(metadata["certificate"])
        stated["blocks"][0]["lipschitz"] *= 0.9
        metadata["certificate"] = json.dumps(stated)

    with pytest.raises(ValueError, match="states a certificate that its weights do not have"):
        ir.load(edited(saved, tmp_path, resigned(larger)))
    with pytest.raises(ValueError, match="states the bounds"):
        ir.load(edited(saved, tmp_path, resigned(tighter)))


@pytest.mark.parametrize("name", ["forward_lipschitz", "inverse_lipschitz", "block", "layer"])
def test_every_bound_that_a_file_states_is_proved(tmp_path, name):
    def lower(tensors, metadata):
        stated = json.loads(metadata["certificate"])
        block = stated["blocks"][1]
        place, key = {
            "block": (block, "inverse"),
            "layer": (block["layers"][0], "upper_bound"),
        }.get(name, (stated, name))
        place[key] *= 0.5
        metadata["certificate"] = json.dumps(stated)

    path, fitted = tmp_path / "model.safetensors", vectors()
    ir.save(path, ir.Fitted(fitted.model, fitted.variables))  # without asinh: all is finite
    with pytest.raises(ValueError, match="that are not proved of its weights"):
        ir.load(edited(path, tmp_path, resigned(lower)))


KERNEL = "variables/params/scale0_blocks/branch/stages_1/kernel"


@pytest.mark.parametrize(
    ("tensor", "value", "told"),
    [
        ("foo", X, "they hold foo"),
        ("variables/params/foo", X, "they hold variables/params/foo"),
        (KERNEL, None, "they lack .*kernel"),
        (KERNEL, np.zeros((2, 2, 6), np.int32), r"must be floats \(2, 2, 6\); got int32"),
        (KERNEL, np.zeros((2, 2, 1), np.float32), r"got float32 \(2, 2, 1\)"),
        ("entrance/0/shift", np.zeros(1, np.float32), "ActNorm before a model of 2 channels"),
        ("entrance/0/shift", None, "missing 1 required positional argument"),
        ("entrance/1/shift", np.zeros(2, np.float32), "before the model is a Asinh"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(saved, tmp_path, tensor, value, told):
    def change(tensors, metadata):
        tensors.pop(tensor, None)
        if value is not None:
            tensors[tensor] = value

    with pytest.raises(ValueError, match=f"describes no model of this version: .*{told}"):
        ir.load(edited(saved, tmp_path, resigned(change)))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("num_levels", "many"),
        ("num_levels", 0),
        ("about", [1]),
        ("certificate", {"certified": True}),
        ("certificate", [1]),
        ("entrance", [{"class": "ActNorm"}, {"class": "Asinh", "columns": ["no", "no"]}]),
        ("entrance", [{"class": "ActNorm"}, {"class": "Asinh", "columns": [True] * 3}]),
        ("entrance", [{"class": "ActNorm"}, {"class": "Pad", "columns": [True] * 2}]),
    ],
)
def test_entries_that_say_nothing_are_refused(saved, tmp_path, entry, value):
    def change(tensors, metadata):
        metadata[entry] = json.dumps(value)

    with pytest.raises(ValueError, match="describes no model of this version"):
        ir.load(edited(saved, tmp_path, resigned(change)))


BIAS = "dequantizer/params/context_0_bias"


@pytest.mark.parametrize(
    ("entry", "tensor", "told"),
    [
        ("absent", None, "a dequantizer, which its settings lack"),
        ({"num_levels": 17, "features": 4, "couplings": 2}, None, r"must be floats \(4,\)"),
        ({"num_levels": 17, "features": 3, "couplings": 1}, None, "they hold dequantizer/params"),
        (
            {"num_levels": 16, "features": 3, "couplings": 2},
            None,
            "A dequantizer of 16 grey levels",
        ),
        ({"num_levels": 17, "width": 3}, None, "width"),
        (None, BIAS, f"they lack {BIAS}"),
    ],
)
def test_a_dequantizer_that_does_not_fit_is_refused(tmp_path, entry, tensor, told):
    def change(tensors, metadata):
        tensors.pop(tensor, None)
        if entry == "absent":
            del metadata["dequantizer"]
        elif entry is not None:
            metadata["dequantizer"] = json.dumps(entry)

    path = tmp_path / "model.safetensors"
    ir.save(path, learned_noise())
    with pytest.raises(ValueError, match=f"describes no model of this version: .*{told}"):
        ir.load(edited(path, tmp_path, resigned(change)))


def test_arrays_in_any_order_are_saved(tmp_path):
    fitted = vectors()
    turned = jax.tree.map(np.asfortranarray, fitted.variables)
    ir.save(tmp_path / "model", ir.Fitted(fitted.model, turned))
    pairs = zip(*map(jax.tree.leaves, (ir.load(tmp_path / "model").variables, turned)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_other_files_and_formats_are_refused(saved, tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors_numpy.save_file({"a": X}, other)
    with pytest.raises(ValueError, match="no file of iresnet_jax"):
        ir.load(other)

    def unknown(tensors, metadata):
        metadata["model"] = metadata["model"].replace("depth", "height")

    with pytest.raises(ValueError, match="describes no model of this version"):
        ir.load(edited(saved, tmp_path, resigned(unknown)))

    def newer(tensors, metadata):
        metadata["format"] = "2"

    with pytest.raises(ValueError, match="has format 2; this version reads 1"):
        ir.load(edited(saved, tmp_path, newer))
    with pytest.raises(FileNotFoundError, match="There is no file 'nowhere'"):
        ir.load("nowhere")
    with pytest.raises(FileNotFoundError):
        ir.load(tmp_path)  # a folder


def test_weights_that_would_be_rounded_are_refused(saved, tmp_path):
    def wider(tensors, metadata):
        tensors["entrance/0/shift"] = tensors["entrance/0/shift"].astype(np.float64)

    with pytest.raises(ValueError, match="holds weights in float64: load it with jax_enable_x64"):
        ir.load(edited(saved, tmp_path, resigned(wider)))


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
        ir.save(tmp_path / "model", ir.Fitted(own, own.init(KEY, X)))

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
