"""The models that come with the library: proved, invertible, and as likely as their cards say."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tfds_data import tfds_dir

import iresnet_jax as ir
from train.data import load_dataset
from train.likelihood import draw_stderr

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "iresnet_jax/shipped"
#: Every shipped model -> the estimator of its log-determinants here. A model of many dimensions
#: takes ir.TruncatedSeries(100).
MODELS = {
    "checkerboard": ir.Exact(),
    "digits": ir.Exact(),
    "mnist": ir.TruncatedSeries(100),
}
#: Of images, whose certificates take 10 and 30 seconds.
LARGE = ["digits", "mnist"]
SMALL = [name for name in MODELS if name not in LARGE]
#: Examples held out, of which a card's likelihood is.
SIZES = {"checkerboard": 10_000, "digits": 360, "mnist": 10_000}
KEY = jax.random.key(0)
#: For blocks that contract as little as the checkerboard's; to the programs' tolerance.
SOLVER = ir.Anderson(rtol=3e-7, atol=3e-7, max_steps=500)
LARGEST = 4 * 2**20  # bytes


@pytest.fixture(
    scope="module", params=[*SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in LARGE)]
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return ir.load(name)


def held_out(name):
    """The test set that a card's likelihood is of."""
    return load_dataset(name, data_dir=tfds_dir(name) if name == "mnist" else None).test


def bits_of(model, name, examples, keys):
    """Bits per dimension of each example, one draw of noise for each key: [draws, examples]."""
    draw = jax.jit(lambda x, key: model.bits_per_dim(x, MODELS[name], key=key))
    return np.stack([np.asarray(draw(examples, key), np.float64) for key in keys])


def test_all_of_them_are_tested_here():
    assert ir.shipped_models() == sorted(MODELS)


def test_their_certificates_are_proved_anew(model):
    certificate = model.certificate
    assert certificate.certified
    assert max(certificate.lipschitz) < 1.0
    stated = model.about["results"]["block_lipschitz_max"]
    np.testing.assert_allclose(max(certificate.lipschitz), stated, rtol=1e-2)


def test_samples_return(model):
    """There and back, samples differ as the card says of data, whose largest errors are near.

    So are the bounds on the inverse of each block. For a whole network of this depth, what is
    proved of the inverse says nothing (see its card).
    """
    samples, drawn = model.sample(KEY, 8, solver=SOLVER)
    flow, results = model.flow, model.about["results"]
    there_and_back = jax.jit(lambda x: flow.inverse(flow.forward_unchecked(x), SOLVER))
    back, info = there_and_back(samples)
    assert drawn.converged.all() and info.converged.all()
    assert float(info.error_bound.max()) < 2.0 * results["block_inverse_error_bound_max"]
    distance = np.abs(np.asarray(back) - np.asarray(samples)).max()
    assert distance < 2.0 * results["reconstruction_max_error"]


def test_held_out_examples_are_as_likely_as_the_card_says(model, name):
    """The mean of 40, within five standard errors by the card's own spread over examples."""
    test, results = held_out(name), model.about["results"]
    found = bits_of(model, name, test[:40], [KEY]).mean()
    spread = results["bits_per_dim_sampling_stderr"] * np.sqrt(len(test))
    assert abs(found - results["bits_per_dim"]) < 5.0 * spread / np.sqrt(40)


@pytest.mark.slow
def test_the_likelihood_of_the_digits_is_had_again():
    """Of all 360 that were held out, within the errors stated, and those of four draws here."""
    model = ir.load("digits")
    results, test = model.about["results"], load_dataset("digits").test
    bits = bits_of(model, "digits", test, jax.random.split(KEY, 4))
    error = np.hypot(draw_stderr(bits), results["bits_per_dim_stderr"])
    assert error < 0.005
    room = 4.0 * error + results["bits_per_dim_bias_bound"]
    assert abs(bits.mean() - results["bits_per_dim"]) < room


def test_their_cards_are_complete(model, name):
    about, results, card = model.about, model.about["results"], model.card
    assert about["data"] == name and about["source"] and about["licence"]
    assert about["trained_with"]["packages"].keys() >= {"iresnet_jax", "jax", "flax"}
    assert about["examples"]["test"] == SIZES[name]
    assert {"seed", "steps", "coeff", "optimizer"} <= about["settings"].keys() | {"seed"}
    for text in (about["licence"], f"{results['bits_per_dim']:.4f} ± ", "proved of the weights"):
        assert text in card
    assert not [line for line in card.splitlines() if "/tmp" in line or "workdir" in line]


def test_their_cards_stand_beside_them_and_on_the_page(model, name):
    assert (SHIPPED / f"{name}.md").read_text(encoding="utf-8") == model.card
    page = (ROOT / "docs/MODELS.md").read_text(encoding="utf-8")
    assert f"```{{include}} ../iresnet_jax/shipped/{name}.md" in page


@pytest.mark.slow
def test_the_page_runs_as_it_stands():
    page, names = (ROOT / "docs/MODELS.md").read_text(encoding="utf-8"), {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(code, "MODELS.md", "exec"), names)
    assert names["info"].converged.all() and np.isfinite(np.asarray(names["bits"])).all()


@pytest.mark.parametrize("name", MODELS)
def test_they_are_small(name):
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < LARGEST


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_file_that_was_changed_is_refused(name, tmp_path):
    content = bytearray((SHIPPED / f"{name}.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or was edited"):
        ir.load(tmp_path / "changed.safetensors")


def test_a_name_that_is_none_is_told_from_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'digit'\. Did you mean 'digits'\?") as told:
        ir.load("digit")
    for text in ("the path of a file of save", "hf://org/name", ", ".join(sorted(MODELS))):
        assert text in str(told.value)


def test_the_citation_states_the_version():
    assert f"\nversion: {ir.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
