"""Files of models that were damaged, edited or signed anew: refused, never loaded as another."""

import json

import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy
from saving_cases import X, at_classes, at_vectors, edited, learned_noise, resigned, vectors

import iresnet_jax as ir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    ir.save(path, vectors())
    return path


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


def test_classes_pass_nothing(tmp_path):
    def change(tensors, metadata):
        metadata["condition_entrance"] = json.dumps([{"class": "Asinh", "columns": []}])

    path = tmp_path / "model.safetensors"
    ir.save(path, at_classes())
    with pytest.raises(ValueError, match="Classes pass no condition_entrance"):
        ir.load(edited(path, tmp_path, resigned(change)))


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
