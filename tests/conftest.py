"""Settings of every test: quick compilation, two CPU devices, deterministic hypothesis, double
precision on request.

A test runs what it compiles once, on tiny arrays: compiling it well would take longer than running
it does. What XLA_FLAGS says in the environment stands.

Rank promotion stays allowed by default, for what the tests compute themselves. Modules that do
without it ask for ``no_rank_promotion``; ``test_strictness.py`` forbids it to the library.
"""

import gc
import os

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

_QUICK = ["--xla_backend_optimization_level=0", "--xla_force_host_platform_device_count=2"]
_QUICK.append("--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true")  # as training
if jax.__version_info__ < (0, 11):  # XLA refuses flags that it does not know
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")  # halves the time of a compilation
    _QUICK.append("--xla_cpu_parallel_codegen_split_count=1")  # every core has a worker already
os.environ["XLA_FLAGS"] = " ".join([*_QUICK, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # likewise; idle, they wait by spinning

jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads what is compiled

settings.register_profile(
    "deterministic",
    deadline=None,  # the first example of a shape compiles
    derandomize=True,
    database=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("deterministic")

#: Takes a seventh more time, so that test_array_types.py turns it on for some tests only.
if os.environ.get("IRESNET_JAX_CHECK_ARRAYS"):
    jaxtyping.install_import_hook("iresnet_jax", "array_types.of_arrays")


#: Longest first: a worker that starts on one of these at the end keeps the others waiting.
LONGEST = [
    *("programs", "reproduce", "notebooks", "parallel", "distributed", "checkpoints", "tools"),
    *("flows", "bijections", "inverse_errors", "likelihood", "layers", "readme"),
    *("foreign_models", "foreign_refusals", "stacks_against_loops", "golden", "certificates"),
]


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish():
    """Tracing allocates much and leaves few cycles: collect rarely, and not what was imported."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


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
