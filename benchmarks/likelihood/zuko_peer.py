"""zuko: a neural spline flow by maximum likelihood, and a continuous flow by flow matching.

The latter learns the velocity z − x along (1 − t)x + tz from data x to noise z; its likelihood has
the exact divergence, and the error of zuko's ODE solver at its own tolerances.
"""

import torch
import zuko

from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.methods import Options
from benchmarks.likelihood.problems import Entrance, Problem
from benchmarks.likelihood.torch_training import (
    batches,
    bits_of,
    descend,
    num_parameters,
    train,
)

_BATCH, _AT_ONCE = 256, 1000


def run(options: Options, cell: Cell, problem: Problem, watch: Watch) -> None:
    """Train until the seconds are over."""
    torch.manual_seed(cell.seed)
    entrance = Entrance.of(problem)
    flow = flow_of(problem.dim, options)
    watch.note(parameters=num_parameters(flow))
    optimizer = torch.optim.Adam(flow.parameters(), lr=options["learning_rate"])
    data = batches(problem, entrance, _BATCH, cell.seed)
    loss = matching_loss if options["flow"] == "cnf" else likelihood_loss

    def step() -> None:
        descend(loss(flow, next(data)), optimizer)

    def log_prob(y: torch.Tensor) -> torch.Tensor:
        flow.eval()
        with torch.no_grad():
            found = flow().log_prob(y)
        flow.train()
        return found

    train(watch, step, bits := bits_of(problem, entrance, log_prob, _AT_ONCE))
    watch.finish(bits)


def flow_of(dim: int, options: Options) -> torch.nn.Module:
    """Return the untrained flow, with zuko's defaults for what the options leave open."""
    hidden = options["hidden"]
    if options["flow"] == "cnf":
        return zuko.flows.CNF(dim, hidden_features=hidden)
    return zuko.flows.NSF(dim, transforms=3, hidden_features=hidden)


def likelihood_loss(flow: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """−log p, the mean over a batch."""
    return -flow().log_prob(x).mean()


def matching_loss(flow: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """‖v(t, (1 − t)x + tz) − (z − x)‖², the mean over a batch, one t and one z for each x."""
    z, t = torch.randn_like(x), torch.rand(len(x))
    at = (1.0 - t[:, None]) * x + t[:, None] * z
    return (flow.transform.f(t, at) - (z - x)).square().mean()
