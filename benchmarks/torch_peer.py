"""The same networks in PyTorch, written from the paper's algorithm.

The log-determinant is differentiated *through the series* (Behrmann et al. 2019, Algorithm 2):
each product with the Jacobian stays on the tape, in forward mode. Images are channels last; power
iterations run once a step from kept vectors, as in the library.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.specs import Spec

_LEVELS = 256
_CLASSES = 10


class Convolution(nn.Module):
    """A 3×3 or 1×1 convolution whose operator norm is constrained by power iteration.

    Args:
      kernel: raw, [height, width, in_channels, out_channels].
      bias: [out_channels].
      vectors: u and v of the power iteration, for the image [height, width, channels] (3×3) or for
        the channels alone (1×1).
      coeff: norm to allow.
      num_steps: power-iteration steps a training step.
    """

    def __init__(self, kernel, bias, vectors, coeff: float, num_steps: int):
        super().__init__()
        weight = torch.tensor(np.ascontiguousarray(np.transpose(kernel, (3, 2, 0, 1))))
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.tensor(bias))
        u, v = (np.reshape(w, (1, 1, -1)) if w.ndim == 1 else w for w in vectors)
        self.register_buffer("u", _image(u[None]))
        self.register_buffer("v", _image(v[None]))
        self.u: torch.Tensor
        self.v: torch.Tensor
        self.coeff, self.num_steps, self.padding = coeff, num_steps, kernel.shape[0] // 2

    def constrained(self) -> torch.Tensor:
        """The weight scaled by min(1, coeff/σ), after the steps of power iteration."""
        with torch.no_grad():
            for _ in range(self.num_steps):
                self.u = _unit(self._convolve(self.weight, self.v))
                self.v = _unit(F.conv_transpose2d(self.u, self.weight, padding=self.padding))
        sigma = torch.sum(self.u * self._convolve(self.weight, self.v))
        return self.weight * (self.coeff / torch.clamp(sigma, min=self.coeff))

    def _convolve(self, weight, x):
        return F.conv2d(x, weight, padding=self.padding)


class Block(nn.Module):
    """y = h + g(h), h = ActNorm(x), g = the convolutions with an ELU before each.

    Args:
      convolutions: first to last.
      log_scale: of ActNorm, [channels].
      shift: likewise.
      activate_first: whether g begins with the ELU.
    """

    def __init__(self, convolutions, log_scale, shift, activate_first: bool):
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.shift = nn.Parameter(torch.tensor(shift))
        self.activate_first = activate_first

    def forward(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        h = self.normalized(x)
        return h + self.branch(h, weights)

    def forward_and_log_det(self, x, weights, v: torch.Tensor, num_terms: int):
        """y, and ActNorm's log-determinant plus Σ (−1)^{k+1}/k vᵀJᵏv, on the tape.

        J v is written out, convolutions and ELU's derivatives: by ``autograd.grad`` with
        ``create_graph``, a step takes more than twice as long.
        """
        h = self.normalized(x)
        g, slopes = self._branch_and_slopes(h, weights)
        log_det = h.shape[2] * h.shape[3] * torch.sum(self.log_scale).expand(len(x))
        power = v
        for k in range(1, num_terms + 1):
            for convolution, weight, slope in zip(self.convolutions, weights, slopes, strict=True):
                power = power if slope is None else power * slope
                power = F.conv2d(power, weight, padding=convolution.padding)
            log_det = log_det + (-1) ** (k + 1) / k * torch.sum(power * v, dim=(1, 2, 3))
        return h + g, log_det

    def _branch_and_slopes(self, h, weights):
        """g, and ELU's derivative before each convolution."""
        slopes: list[torch.Tensor | None] = []
        for i, (convolution, weight) in enumerate(zip(self.convolutions, weights, strict=True)):
            active = bool(i) or self.activate_first
            h = F.elu(h) if active else h
            slopes.append(torch.clamp(h, max=0.0) + 1.0 if active else None)
            h = F.conv2d(h, weight, convolution.bias, padding=convolution.padding)
        return h, slopes

    def inverse(self, y: torch.Tensor, weights, num_steps: int) -> torch.Tensor:
        """``num_steps`` of h ← y − g(h), as the authors invert."""
        h = y
        for _ in range(num_steps):
            h = y - self.branch(h, weights, elu=_elu)
        return (h - _channels(self.shift)) * torch.exp(-_channels(self.log_scale))

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """ActNorm."""
        return x * torch.exp(_channels(self.log_scale)) + _channels(self.shift)

    def branch(self, h: torch.Tensor, weights: Sequence[torch.Tensor], elu=F.elu) -> torch.Tensor:
        """g."""
        for i, (convolution, weight) in enumerate(zip(self.convolutions, weights, strict=True)):
            h = elu(h) if i or self.activate_first else h
            h = F.conv2d(h, weight, convolution.bias, padding=convolution.padding)
        return h


class Network(nn.Module):
    """Scales of blocks, a squeeze between them; a Gaussian prior, or the classifier's head.

    Args:
      spec: the network.
      variables: of the library's model, whose weights are copied.
    """

    def __init__(self, spec: Spec, variables: Any):
        super().__init__()
        self.spec = spec
        self.scales = nn.ModuleList(
            nn.ModuleList(_blocks(spec, variables, i)) for i in range(len(spec.depths))
        )
        channels = spec.scale_shapes()[-1][2]
        if spec.kind == "density":
            self.mean = nn.Parameter(_image(variables["params"]["prior_mean_0"][None]))
            self.log_std = nn.Parameter(_image(variables["params"]["prior_log_std_0"][None]))
        else:
            self.norm, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, _CLASSES)

    def weights(self) -> list[list[list[torch.Tensor]]]:
        """The constrained weights of every scale's blocks; advances the power iterations."""
        return [
            [[conv.constrained() for conv in block.convolutions] for block in scale]
            for scale in self.scales
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Latents of centred images."""
        for i, (scale, weights) in enumerate(zip(self.scales, self.weights(), strict=True)):
            x = squeeze(x) if i else x
            for block, block_weights in zip(scale, weights, strict=True):
                x = block(x, block_weights)
        return x

    def forward_and_log_det(self, x: torch.Tensor, probe: Callable, num_terms: int):
        """Latents and log-determinant of centred images."""
        log_det = torch.zeros(len(x), device=x.device)
        for i, (scale, weights) in enumerate(zip(self.scales, self.weights(), strict=True)):
            x = squeeze(x) if i else x
            for block, block_weights in zip(scale, weights, strict=True):
                x, term = block.forward_and_log_det(x, block_weights, probe(x), num_terms)
                log_det = log_det + term
        return x, log_det

    @torch.no_grad()
    def inverse(self, z: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Centred images of latents, every block by ``num_steps`` plain steps."""
        for i, (scale, weights) in reversed(
            list(enumerate(zip(self.scales, self.weights(), strict=True)))
        ):
            for block, block_weights in reversed(list(zip(scale, weights, strict=True))):
                z = block.inverse(z, block_weights, num_steps)
            z = unsqueeze(z) if i else z
        return z

    def density_loss(self, images: torch.Tensor, num_terms: int) -> torch.Tensor:
        """Bits per dimension of dequantised grey levels."""
        x = (images + torch.rand_like(images)) / _LEVELS - 0.5
        z, log_det = self.forward_and_log_det(x, rademacher, num_terms)
        standardized = (z - self.mean) * torch.exp(-self.log_std)
        terms = -0.5 * standardized**2 - self.log_std - 0.5 * math.log(2.0 * math.pi)
        log_prob = terms.sum(dim=(1, 2, 3)) + log_det
        return -log_prob.mean() / (self.spec.dim * math.log(2.0)) + math.log2(_LEVELS)

    def classification_loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the head's logits."""
        x = F.pad((images / (_LEVELS - 1) - 0.5) / 0.25, (0, 0, 0, 0, 0, self.spec.padding))
        x = self(x.contiguous(memory_format=torch.channels_last))
        logits = self.linear(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return F.cross_entropy(logits, labels)


class Training:
    """A training run on one repeated batch, with a fused AdamW.

    Args:
      spec: the network.
      variables: of the library's model.
      batch: images [batch, height, width, channels], and labels.
      num_terms: of the series.
      device: where.
      autocast: a type for the branches to compute in, or None.
      compiled: whether ``torch.compile`` compiles the blocks and the constraints; blocks of equal
        shapes share what it makes.
    """

    def __init__(
        self,
        spec: Spec,
        variables,
        batch,
        num_terms: int,
        *,
        device="cpu",
        autocast=None,
        compiled=False,
    ):
        images, labels = batch
        self.network = Network(spec, variables).to(device)
        if compiled:
            _compile(self.network)
        self._images = _image(images.astype(np.float32)).to(device)
        self._labels = torch.tensor(labels, device=device)
        self._num_terms, self._device, self._autocast = num_terms, device, autocast
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, fused=True)

    def step(self) -> None:
        """One training step, to its end."""
        self.run(1)

    def run(self, steps: int) -> None:
        """Several training steps, to their end."""
        for _ in range(steps):
            self._step()
        if self._device != "cpu":
            torch.cuda.synchronize()

    def _step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device, self._autocast, enabled=self._autocast is not None):
            if self.network.spec.kind == "density":
                loss = self.network.density_loss(self._images, self._num_terms)
            else:
                loss = self.network.classification_loss(self._images, self._labels)
        loss.backward()
        self._optimizer.step()


def _compile(network: Network) -> None:
    """Compile by part: the whole step, unrolled over 48 blocks, would take many minutes."""
    torch._dynamo.config.recompile_limit = 64
    for module in network.modules():
        if isinstance(module, Block):
            name = "forward_and_log_det" if network.spec.kind == "density" else "forward"
            setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
        if isinstance(module, Convolution):
            module.constrained = torch.compile(module.constrained, dynamic=False)  # type: ignore[method-assign]


def rademacher(x: torch.Tensor) -> torch.Tensor:
    """Random signs of the shape of ``x``."""
    return torch.empty_like(x).bernoulli_(0.5).mul_(2.0).sub_(1.0).detach()


def squeeze(x: torch.Tensor) -> torch.Tensor:
    """Space to depth, channels in the library's order: (row, column, channel)."""
    n, c, h, w = x.shape
    patches = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return patches.reshape(n, 4 * c, h // 2, w // 2).contiguous(memory_format=torch.channels_last)


def unsqueeze(x: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`squeeze`."""
    n, c, h, w = x.shape
    patches = x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return patches.reshape(n, c // 4, 2 * h, 2 * w).contiguous(memory_format=torch.channels_last)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Images [batch, height, width, channels]."""
    return x.detach().permute(0, 2, 3, 1).cpu().numpy()


def to_torch(x: np.ndarray) -> torch.Tensor:
    """The inverse of :func:`to_numpy`."""
    return _image(np.asarray(x))


def _blocks(spec: Spec, variables, index: int) -> list[Block]:
    """The blocks of a scale, with the library's weights."""
    params, vectors = (variables[kind][f"scale{index}_blocks"] for kind in ("params", "spectral"))
    blocks = []
    for i in range(len(params["shift"])):
        convolutions = [
            _convolution(spec, params["branch"][name], vectors["branch"][name]["vectors"], i)
            for name in sorted(params["branch"])
        ]
        log_scale, shift = np.array(params["log_scale"][i]), np.array(params["shift"][i])
        blocks.append(Block(convolutions, log_scale, shift, activate_first=index + i > 0))
    return blocks


def _convolution(spec: Spec, params, vectors, index: int) -> Convolution:
    kernel, bias = np.array(params["kernel"][index]), np.array(params["bias"][index])
    pair = [np.array(w[index]) for w in vectors]
    return Convolution(kernel, bias, pair, spec.coeff, spec.power_steps)


def _image(x: np.ndarray) -> torch.Tensor:
    """[batch, channels, height, width], channels last in memory, from NHWC."""
    copy = torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    return copy.contiguous(memory_format=torch.channels_last)


def _channels(x: torch.Tensor) -> torch.Tensor:
    return x[None, :, None, None]


def _elu(x: torch.Tensor) -> torch.Tensor:
    """ELU without a tape, where it is faster than PyTorch's own: 3.2 ms a million for 4.8."""
    return torch.maximum(x, torch.clamp(x, max=0.0).exp_().sub_(1.0))


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x).clamp(min=torch.finfo(x.dtype).tiny)
