"""What images go through before a step, and what is logged of it."""

import jax
import jax.numpy as jnp
import numpy as np

from train.configs import CLASSIFICATION
from train.preprocessing import crop_and_flip, denormalize, normalize
from train.steps import _norm

CIFAR10 = CLASSIFICATION["cifar10"]


def test_normalisation_is_undone():
    images = np.random.default_rng(0).integers(256, size=(3, 4, 4, 3), dtype=np.uint8)
    x = normalize(jnp.asarray(images), 256, CIFAR10.mean, CIFAR10.std)
    expected = (images / 255 - np.array(CIFAR10.mean)) / np.array(CIFAR10.std)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(denormalize(x, CIFAR10.mean, CIFAR10.std), images / 255, atol=1e-6)


def test_the_norm_that_is_logged_is_that_of_all_arrays_together():
    tree = {"a": jnp.array([[3.0, 0.0]]), "b": (jnp.array(4.0), jnp.full(144, 1.0))}
    np.testing.assert_allclose(_norm(tree), 13.0, rtol=1e-6)


def test_one_number_serves_every_channel():
    x = normalize(jnp.full((1, 2, 2, 3), 255, jnp.uint8), 256, (0.25,), (0.5,))
    np.testing.assert_allclose(x, 1.5)


def test_crops_are_windows_of_the_image_in_its_margin_or_of_its_mirror():
    rng = np.random.default_rng(1)
    images = rng.integers(1, 256, size=(200, 12, 12, 1), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(0), len(images))
    out = np.asarray(crop_and_flip(jnp.asarray(images), keys))
    places = []
    for image, crop in zip(images, out, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="symmetric")
        windows = {
            (flip, top, left): padded[top : top + 12, left : left + 12][:, :: 1 - 2 * flip]
            for flip in (0, 1) for top in range(9) for left in range(9)
        }  # fmt: skip
        found = [place for place, window in windows.items() if np.array_equal(window, crop)]
        assert found
        places.append(found[0])
    flips, tops, lefts = np.array(places).T
    assert 60 < flips.sum() < 140
    assert set(tops) == set(lefts) == set(range(9))


def test_an_images_crop_depends_on_its_key_alone():
    images = jnp.arange(2 * 6 * 6, dtype=jnp.uint8).reshape(2, 6, 6, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    both = crop_and_flip(images, keys)
    np.testing.assert_array_equal(crop_and_flip(images[1:], keys[1:]), both[1:])
