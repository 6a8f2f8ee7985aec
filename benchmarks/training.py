"""A training step beside the same network in PyTorch, or beside normflows' residual flow."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from benchmarks import ours
from benchmarks.specs import SPECS, Spec
from benchmarks.timing import alternate, ratio
from iresnet_jax.stages import Precision

#: How ``ours.Training`` is told.
REMAT = {"default": None, "yes": True, "no": False}
Remat = Literal["default", "yes", "no"]
Peer = Literal["torch", "normflows", "remat", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """One training step: spectral normalisation, forward, log-det, backward, optimiser."""

    config: str = "D2"
    """D1, D2, D3, C, or tiny; see benchmarks/specs.py."""
    terms: int = 5
    """Of the log-determinant's series."""
    peer: Peer = "torch"
    """torch: differentiating through the series; normflows: its Neumann gradient; remat: ours,
    recomputing blocks; none."""
    remat: Remat = "default"
    """Whether ours recomputes blocks in the backward pass; default: where densities are trained."""
    precision: Precision = "float32"
    """Inside the branches, of both."""
    rounds: int = 15
    """Pairs of turns."""
    calls: int = 1
    """Steps in a turn."""
    json: Path | None = None
    """Where the result goes, beside the terminal."""


def run(options: Train) -> dict[str, Any]:
    """Times, their ratio (the peer's over ours), and that both compute the same."""
    spec = SPECS[options.config]
    remat = REMAT[options.remat]
    training = ours.Training(spec, options.terms, remat=remat, precision=options.precision)
    steps = {"ours": training.step}
    agreement: dict[str, Any] = {}
    if options.peer != "none":
        steps["peer"], agreement = _peer(options, spec, training)
    taken = alternate(steps, options.rounds, options.calls)
    result = {
        "seconds_ours": float(np.median(taken["ours"])),
        "images_per_second": spec.batch / float(np.median(taken["ours"])),
        "temporary_megabytes": training.temporary_bytes() / 1e6,
        "convolution_gflop": spec.step_flops(options.terms) / 1e9,
        **agreement,
    }
    return result | (ratio(taken["peer"], taken["ours"]) if "peer" in taken else {})


def _peer(options: Train, spec: Spec, training: ours.Training):
    if options.peer == "remat":
        other = ours.Training(spec, options.terms, remat=True, precision=options.precision)
        return other.step, {}
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.peer == "normflows":
        from benchmarks import normflows_peer

        return normflows_peer.Training(spec, ours.random_batch(spec)[0], options.terms).step, {}
    from benchmarks import torch_peer

    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = options.precision == "tensorfloat32"
    torch.backends.cudnn.allow_tf32 = options.precision == "tensorfloat32"
    autocast = torch.bfloat16 if options.precision == "bfloat16" else None
    peer = torch_peer.Training(
        spec,
        training.variables,
        ours.random_batch(spec),
        options.terms,
        device="cuda" if cuda else "cpu",
        autocast=autocast,
    )
    return peer.step, agreement(spec, training, options.terms)


def agreement(spec: Spec, training: ours.Training, num_terms: int) -> dict[str, float]:
    """Largest differences, from the same weights: of latents, and of log-determinants per dim.

    Raises:
      AssertionError: where the two are not the same network.
    """
    import torch

    from benchmarks import torch_peer

    flow = training.model.flow(training.variables)
    frozen = dataclasses.replace(spec, power_steps=0)
    network = torch_peer.Network(frozen, training.variables)
    images = ours.random_batch(spec)[0][:4].astype(np.float32) / 256.0
    if spec.kind == "classification":
        padded = np.pad(images, [(0, 0)] * 3 + [(0, spec.padding)])
        with torch.no_grad():
            z = torch_peer.to_numpy(network(torch_peer.to_torch(padded)))
        gap = float(np.abs(z - np.asarray(flow.forward(jnp.asarray(images))[-1])).max())
        assert gap < 1e-4, gap
        return {"latents_differ_by": gap}

    def probe(x: torch.Tensor) -> torch.Tensor:
        return torch_peer.to_torch(ours.fixed_probe(torch_peer.to_numpy(x).shape))

    theirs, their_log_det = network.forward_and_log_det(
        torch_peer.to_torch(images - 0.5), probe, num_terms
    )
    z, log_det = ours.latents_and_log_det(flow, images, num_terms)
    gaps = {
        "latents_differ_by": float(np.abs(z - torch_peer.to_numpy(theirs)).max()),
        "log_det_differs_by": float(np.abs(log_det - their_log_det.detach().numpy()).max())
        / spec.dim,
    }
    assert max(gaps.values()) < 1e-4, gaps
    return gaps
