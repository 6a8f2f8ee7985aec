"""normflows: its residual flow of vectors, as its notebook trains it."""

import normflows as nf
import torch
from normflows.utils.optim import update_lipschitz

from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.methods import Options
from benchmarks.likelihood.problems import Entrance, Problem
from benchmarks.likelihood.torch_training import (
    batches,
    bits_of,
    descend,
    exact_log_det,
    in_double,
    num_parameters,
    train,
)

_BLOCKS, _WIDTH, _NORM, _BATCH = 16, 128, 0.9, 512
_AT_ONCE = 2000


def run(options: Options, cell: Cell, problem: Problem, watch: Watch) -> None:
    """Train until the seconds are over."""
    torch.manual_seed(cell.seed)
    entrance = Entrance.of(problem)
    data = batches(problem, entrance, _BATCH, cell.seed)
    model = model_of(problem.dim, 2 if cell.smoke else _BLOCKS)
    model.log_prob(next(data))  # initialises ActNorm
    watch.note(parameters=num_parameters(model))
    rate = options["learning_rate"]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-5)

    def step() -> None:
        descend(model.forward_kld(next(data)), optimizer)
        update_lipschitz(model, options["power_steps"])

    def log_prob(y: torch.Tensor) -> torch.Tensor:
        return exact_log_prob(in_double(model), y.double())

    train(watch, step, bits := bits_of(problem, entrance, log_prob, _AT_ONCE))
    watch.finish(bits)


def model_of(dim: int, blocks: int) -> torch.nn.Module:
    """Return the untrained flow."""
    flows = []
    for _ in range(blocks):
        widths = [dim, _WIDTH, _WIDTH, dim]
        net = nf.nets.LipschitzMLP(widths, init_zeros=True, lipschitz_const=_NORM)
        flows += [nf.flows.Residual(net, reduce_memory=True), nf.flows.ActNorm(dim)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), flows)


def exact_log_prob(model: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Return log p in nats, [n], each block's log-determinant by its full Jacobian."""
    total = torch.zeros(len(y), dtype=y.dtype)
    for flow in reversed(model.flows):
        if isinstance(flow, nf.flows.Residual):
            g, log_det = exact_log_det(flow.iresblock.nnet, y)
            y = y + g
        else:
            y, log_det = flow.inverse(y)
        total = total + log_det.detach()
    return total + model.q0.log_prob(y.detach())
