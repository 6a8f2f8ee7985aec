"""Settings of every test: deterministic hypothesis, and double precision on request.

Rank promotion stays allowed by default: the library adds biases, shifts and means of shape
[channels] to batches. Modules that do without it ask for ``no_rank_promotion``.
"""

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "deterministic",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    database=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")


@pytest.fixture
def x64():
    """Double precision inside of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def no_rank_promotion():
    """Implicit rank promotion raises."""
    with jax.numpy_rank_promotion("raise"):
        yield
