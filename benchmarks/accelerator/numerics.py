"""Whether what is proved on a CPU holds on the device: every figure beside one in float64.

Oracles run on the host: dense matrices and their singular values, full Jacobians, inverses in
double precision. A part that does not hold says so ("holds"), and the command fails.
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ours
from benchmarks.accelerator.records import Record
from benchmarks.accelerator.settings import Settings
from benchmarks.specs import SPECS
from iresnet_jax import (
    Anderson,
    Exact,
    Flow,
    Residual,
    conv_operator,
    inverse_error_bound,
    inverse_error_in_double,
    layer_upper_bound,
    power_iteration_to_tolerance,
    sigma_estimate,
    to_matrix,
)
from iresnet_jax.nn import converge
from iresnet_jax.spectral import init_singular_vectors

_TERMS = 8
_IMAGES = 8


def measure(record: Record, settings: Settings) -> None:
    """Norms, bounds, inverses, log-determinants and the records of the authors' code."""
    _products(record)
    _norms(record)
    flow = _network()
    x = np.random.default_rng(2).uniform(size=(_IMAGES, *flow.event_shape)).astype(np.float32)
    certificate, on_host = flow.certify(), _on_host(flow).certify()
    _certificates(record, certificate, on_host, flow)
    _log_dets(record, flow, x)
    for precision in ("float32", "tensorfloat32"):
        _inverse(record, flow, x, precision, certificate)
    if settings.golden is not None:
        _golden_records(record, settings.golden)


def _products(record: Record) -> None:
    """What a product of the device's default precision is off by, and the library's own."""
    a = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    exact = a.astype(np.float64) @ a
    errors = {
        f"{name}_error": _relative(jnp.matmul(a, a, precision=precision), exact)
        for name, precision in (("default", None), ("highest", "highest"))
    }
    record.add("products", **errors, holds=errors["highest_error"] < 1e-5)


def _norms(record: Record) -> None:
    """A convolution's norm by power iteration, and its rigorous bound."""
    kernel = np.random.default_rng(1).normal(size=(3, 3, 4, 16)).astype(np.float32)
    operator = conv_operator(jnp.asarray(kernel), (8, 8))
    start = init_singular_vectors(operator)
    vectors, _ = power_iteration_to_tolerance(operator, start, rtol=1e-5, max_steps=10_000)
    estimate = float(sigma_estimate(operator, vectors))
    bound = layer_upper_bound(operator)
    with jax.default_device(_host()), jax.enable_x64(True):
        norm = _spectral_norm(to_matrix(conv_operator(jnp.asarray(kernel, jnp.float64), (8, 8))))
    record.add(
        "norm of a convolution",
        exact=norm,
        estimate_off_by=abs(estimate / norm - 1.0),
        bound_over_exact=bound / norm,
        holds=norm <= bound <= 1.1 * norm and abs(estimate / norm - 1.0) < 1e-4,
    )


def _network() -> Flow:
    """A small density model, after a few steps of training on the device."""
    training = ours.Training(SPECS["tiny"], 3)
    training.run(10)
    variables = jax.jit(lambda v: converge(training.model, v))(training.state.variables)
    return jax.jit(training.model.flow)(variables)


def _certificates(record: Record, found: Any, on_host: Any, flow: Flow) -> None:
    """Bounds of whole blocks, made on the device and on the host, and Jacobians within them."""
    here, there = (np.asarray(c.lipschitz, np.float64) for c in (found, on_host))
    norms = np.array([_largest_jacobian(branch, x) for branch, x in _branches(flow)])
    record.add(
        "certificate",
        largest=float(here.max()),
        differs_from_the_hosts_by=float(np.abs(here / there - 1.0).max()),
        largest_jacobian_over_bound=float(np.max(norms / here)),
        holds=bool(np.all(norms <= here)) and found.certified == on_host.certified,
    )


def _branches(flow: Flow) -> Iterator[tuple[Any, np.ndarray]]:
    """Every residual branch, in float64 on the host, and points to look at."""
    depths, shapes = SPECS["tiny"].depths, SPECS["tiny"].scale_shapes()
    shape_of = [shape for depth, shape in zip(depths, shapes, strict=True) for _ in range(depth)]
    rng = np.random.default_rng(3)
    for block, shape in zip(flow.blocks(), shape_of, strict=True):
        (residual,) = (link for link in block.links if isinstance(link, Residual))  # type: ignore[attr-defined]
        yield residual.branch, rng.normal(size=(_IMAGES, *shape))


def _largest_jacobian(branch: Any, x: np.ndarray) -> float:
    with jax.default_device(_host()), jax.enable_x64(True):
        return max(map(_spectral_norm, _jacobians(_wide(branch), jnp.asarray(x))))


def _log_dets(record: Record, flow: Flow, x: np.ndarray) -> None:
    """Exactly, and by the series along one probe, on the device; both in float64 on the host."""
    estimators = {"exact": Exact(), "series": ours.fixed_probe_series(_TERMS)}
    with jax.default_matmul_precision("highest"):
        found = {k: np.asarray(_log_det(flow, x, e)) for k, e in estimators.items()}
    with jax.default_device(_host()), jax.enable_x64(True):
        wide, wide_x = _wide(flow), jnp.asarray(x, jnp.float64)
        oracle = {"series": np.asarray(_log_det(wide, wide_x, estimators["series"]))}
        jacobians = _jacobians(lambda x: wide.forward(x)[0], wide_x)
        oracle["exact"] = np.linalg.slogdet(jacobians)[1]
    off = {f"{k}_off_by": float(np.abs(found[k] - oracle[k]).max()) / flow.dim for k in found}
    record.add("log-determinant, nats per dimension", **off, holds=max(off.values()) < 1e-5)


def _log_det(flow: Flow, x: Any, estimator: Any) -> jax.Array:
    return jax.jit(lambda flow, x: flow.forward_and_log_det(x, estimator)[1])(flow, x)


def _inverse(record: Record, flow: Flow, x: np.ndarray, precision: str, certificate: Any) -> None:
    """The distance to the exact preimage, and the rigorous bound on it."""
    bounded = _with_precision(flow.with_bounds(certificate), precision)
    reach = 3e-7 if precision == "float32" else 3e-4
    solver = Anderson(reach, reach, 500)

    @jax.jit
    def there_and_back(flow: Flow, x: Any) -> Any:
        latents = flow.forward(x)
        back, info = flow.inverse(latents, solver)
        return latents, back, info, inverse_error_bound(flow, info, latents)

    latents, back, info, bound = jax.device_get(there_and_back(bounded, x))
    sharp = inverse_error_in_double(flow.with_bounds(certificate), back, latents)
    record.add(
        f"inverse, {precision}",
        evaluations=int(info.num_steps.max()),
        converged=bool(info.converged.all()),
        reconstruction_off_by=float(np.abs(back - x).max()),
        exact_preimage_off_by=float(sharp.max()),
        bound=float(bound.max()),
        holds=bool(np.all(sharp <= bound)) and bool(info.converged.all()),
    )


def _golden_records(record: Record, folder: Path) -> None:
    """The tests against the authors' own numbers, on this device."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0"]
    done = subprocess.run(
        [*command, str(root / "tests" / "test_golden.py")],
        env={**os.environ, "IRESNET_JAX_GOLDEN": str(folder), "XLA_PYTHON_CLIENT_PREALLOCATE": "0"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-4000:], done.stderr[-2000:])
    last = [*done.stdout.strip().splitlines(), "nothing was printed"][-1]
    record.add("records of the authors' code", tests=last, holds=done.returncode == 0)


def _with_precision(flow: Flow, precision: str) -> Flow:
    def changed(node: Any) -> Any:
        if hasattr(node, "precision"):
            return dataclasses.replace(node, precision=precision)
        return node

    leaves, tree = jax.tree.flatten(flow, is_leaf=lambda n: hasattr(n, "precision"))
    return jax.tree.unflatten(tree, map(changed, leaves))


def _jacobians(function: Any, x: jax.Array) -> np.ndarray:
    """∂f/∂x of each sample, [batch, d, d], one sample at a time."""
    one = jax.jit(jax.jacfwd(lambda x: jnp.ravel(function(x[None]))))
    return np.stack([np.reshape(one(row), (row.size, row.size)) for row in x])


def _spectral_norm(matrix: Any) -> float:
    """Of a linear map given by an array [*outputs, *inputs] of as many axes each."""
    matrix = np.asarray(matrix, np.float64)
    outputs = math.prod(matrix.shape[: matrix.ndim // 2])
    return float(np.linalg.norm(matrix.reshape(outputs, -1), 2))


def _relative(found: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def _on_host(tree: Any) -> Any:
    return jax.device_put(jax.device_get(tree), _host())


def _wide(tree: Any) -> Any:
    """The same weights in float64."""

    def widened(leaf: Any) -> Any:
        values = np.asarray(leaf)
        floating = np.issubdtype(values.dtype, np.floating)
        return jnp.asarray(values, jnp.float64 if floating else None)

    return jax.tree.map(widened, tree)


def _host() -> jax.Device:
    return jax.devices("cpu")[0]
