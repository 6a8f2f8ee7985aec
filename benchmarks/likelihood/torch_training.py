"""What the peers in PyTorch share: batches, the loop, and log-determinants by the full Jacobian."""

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.problems import Bits, Entrance, Problem, in_parts

Module = TypeVar("Module", bound=torch.nn.Module)
LogProb = Callable[[torch.Tensor], torch.Tensor]


def num_parameters(module: torch.nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def batches(problem: Problem, entrance: Entrance, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches for ever: a new order each epoch, new noise for images, the rest left out."""
    rng, count = np.random.default_rng(seed), problem.train.points.shape[1]
    size = min(size, count)
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            points = problem.drawn(rng, order[start : start + size])
            yield torch.from_numpy(entrance(points))


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take one step; none where the loss is not finite, as normflows has it."""
    optimizer.zero_grad()
    if torch.isfinite(loss):
        loss.backward()
        optimizer.step()


def train(watch: Watch, step: Callable[[], None], bits: Bits) -> None:
    """Step until the seconds are over."""
    while not watch.over:
        step()
        watch.step(bits)


def bits_of(problem: Problem, entrance: Entrance, log_prob: LogProb, at_once: int) -> Bits:
    """Return bits per dimension by log p in nats of what the network sees."""

    def part(y: np.ndarray) -> np.ndarray:
        return log_prob(torch.from_numpy(y)).detach().double().numpy()

    def nats(points: np.ndarray) -> np.ndarray:
        return in_parts(part, entrance(points), at_once) + entrance.log_det(points)

    return problem.bits_of(nats)


def in_double(module: Module) -> Module:
    """Return a copy in float64, for evaluation."""
    return copy.deepcopy(module).double().eval()


def exact_log_det(branch: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g(x) and ln|det(I + ∂g/∂x)|, [n], by the full Jacobian.

    Args:
      branch: g, which keeps the shape.
      x: [n, ...].
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        g = branch(x)
        flat = g.reshape(len(x), -1)
        rows = [
            torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in flat.unbind(1)
        ]
    jacobian = torch.stack([row.reshape(len(x), -1) for row in rows], dim=1)
    identity = torch.eye(flat.shape[1], dtype=x.dtype)
    return g.detach(), torch.linalg.slogdet(identity + jacobian)[1]
