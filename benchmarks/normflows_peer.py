"""The same shape of network in normflows: residual flows by their authors, from the package index.

Blocks, filters, batch, terms and power iterations are those of the spec; its branches begin with a
Swish, its Neumann gradient is on, and its gradient of the log-determinant is taken in the forward
pass to save memory (``reduce_memory``). Images are channels first: it views them so.
"""

import math

import normflows
import numpy as np
import torch
from normflows.utils.optim import update_lipschitz

from benchmarks.specs import Spec
from benchmarks.torch_peer import squeeze, to_torch

_LEVELS = 256


class Training:
    """A training run on one repeated batch, with a fused AdamW.

    Args:
      spec: of a density model.
      images: [batch, height, width, channels], grey levels.
      num_terms: of the series.
    """

    def __init__(self, spec: Spec, images: np.ndarray, num_terms: int):
        self._scales = torch.nn.ModuleList(
            torch.nn.ModuleList(_block(spec, i, num_terms) for _ in range(depth))
            for i, depth in enumerate(spec.depths)
        )
        height, width, channels = spec.scale_shapes()[-1]
        self._mean = torch.nn.Parameter(torch.zeros(channels, height, width))
        self._log_std = torch.nn.Parameter(torch.zeros(channels, height, width))
        self._power_steps = spec.power_steps
        self._images = to_torch(images.astype(np.float32)).contiguous()
        self._dim = spec.dim
        parameters = [*self._scales.parameters(), self._mean, self._log_std]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step(self) -> None:
        """One training step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self._optimizer.step()
        update_lipschitz(self._scales, self._power_steps)

    def _loss(self) -> torch.Tensor:
        x = (self._images + torch.rand_like(self._images)) / _LEVELS - 0.5
        log_det = torch.zeros(len(x))
        for i, scale in enumerate(self._scales):
            x = squeeze(x).contiguous() if i else x
            for actnorm, residual in scale:
                x, term = actnorm(x)
                log_det = log_det + term
                x, term = residual(x)
                log_det = log_det + term
        standardized = (x - self._mean) * torch.exp(-self._log_std)
        terms = -0.5 * standardized**2 - self._log_std - 0.5 * math.log(2.0 * math.pi)
        log_prob = terms.sum(dim=(1, 2, 3)) + log_det
        return -log_prob.mean() / (self._dim * math.log(2.0)) + math.log2(_LEVELS)


def _block(spec: Spec, scale: int, num_terms: int) -> torch.nn.ModuleList:
    channels, features = spec.scale_shapes()[scale][2], spec.features[scale]
    branch = normflows.nets.LipschitzCNN(
        [channels, features, features, channels],
        [3, 1, 3],
        lipschitz_const=spec.coeff,
        max_lipschitz_iter=spec.power_steps,
        init_zeros=False,
    )
    residual = normflows.flows.Residual(
        branch, reverse=False, reduce_memory=True, n_power_series=num_terms
    )
    actnorm = normflows.flows.ActNorm((channels, 1, 1))
    return torch.nn.ModuleList([actnorm, residual])
