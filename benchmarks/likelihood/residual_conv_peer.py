"""normflows: its residual blocks of convolutions, with our blocks and filters.

A squeeze comes before each scale, nothing is factored out, and the latent is standard normal.
Log-determinants are exact up to 64 dimensions. Beyond, they are by normflows' own estimator while
training runs, 20 terms and more at random; the last ones are by this library's, whose variance is
proved to be finite, where the network is certified.
"""

import math

import normflows as nf
import torch
from normflows.utils.optim import update_lipschitz

from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.layouts import image_config
from benchmarks.likelihood.methods import Options
from benchmarks.likelihood.problems import Bits, Entrance, Floats, Problem
from benchmarks.likelihood.torch_training import (
    batches,
    bits_of,
    descend,
    exact_log_det,
    in_double,
    num_parameters,
    train,
)

_NORM, _BATCH = 0.97, 64
_MOST_EXACT, _AT_ONCE = 64, 100


class ConvolutionalFlow(torch.nn.Module):
    """Images as flat vectors, in the order (row, column, channel), to latents and log p.

    Args:
      image_shape: (height, width, channels).
      depths: blocks of each scale.
      filters: inside of the branches.
    """

    def __init__(self, image_shape: tuple[int, int, int], depths: tuple[int, ...], filters: int):
        super().__init__()
        self._image_shape = image_shape
        channels = image_shape[2]
        scales = []
        for depth in depths:
            channels *= 4
            blocks = [module for _ in range(depth) for module in _block(channels, filters)]
            scales.append(torch.nn.ModuleList(blocks))
        self.scales = torch.nn.ModuleList(scales)

    def log_prob(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Return log p in nats, [n]; by each block's full Jacobian if it is to be exact."""
        height, width, channels = self._image_shape
        y = x.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        total = torch.zeros(len(x), dtype=x.dtype)
        for scale in self.scales:
            y = torch.nn.functional.pixel_unshuffle(y, 2).contiguous()  # normflows views it
            for flow in scale:
                if exact and isinstance(flow, nf.flows.Residual):
                    g, log_det = exact_log_det(flow.iresblock.nnet, y)
                    y = y + g
                else:
                    y, log_det = flow.inverse(y)
                total = total + log_det
        z = y.flatten(1)
        return total - 0.5 * (z.square() + math.log(2.0 * math.pi)).sum(dim=1)


def run(options: Options, cell: Cell, problem: Problem, watch: Watch) -> None:
    """Train until the seconds are over."""
    torch.manual_seed(cell.seed)
    entrance = Entrance.of(problem, standardize=False)
    data = batches(problem, entrance, _BATCH, cell.seed)
    config = image_config(cell.data)
    depths = (1,) * len(config.depths) if cell.smoke else config.depths
    model = ConvolutionalFlow(problem.image_shape, depths, config.features[0])
    model.log_prob(next(data))  # initialises ActNorm
    watch.note(parameters=num_parameters(model))
    rate = options["learning_rate"]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-5)

    def step() -> None:
        descend(-model.log_prob(next(data)).mean(), optimizer)
        update_lipschitz(model, options["power_steps"])

    def log_prob(y: torch.Tensor) -> torch.Tensor:
        if problem.dim <= _MOST_EXACT:
            return in_double(model).log_prob(y.double(), exact=True).detach()
        model.eval()
        found = model.log_prob(y).detach()
        model.train()
        return found

    train(watch, step, bits := bits_of(problem, entrance, log_prob, _AT_ONCE))
    if problem.dim <= _MOST_EXACT:
        watch.finish(bits)
    else:
        with watch.clock.stopped():
            certified = _certified(model, problem, entrance)
        watch.finish(*(certified or (bits, "normflows' estimator: not certified")))


def _certified(
    model: ConvolutionalFlow, problem: Problem, entrance: Entrance
) -> tuple[Bits, str] | None:
    """Bits per dimension by the certificate of the converted network, and by what."""
    from benchmarks.likelihood.converted_peer import certified_log_prob  # imports JAX

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if (found := certified_log_prob(state, problem.image_shape, _NORM)) is None:
        return None
    log_prob, by = found

    def nats(points: Floats) -> Floats:
        return log_prob(entrance(points)) + entrance.log_det(points)

    return problem.bits_of(nats), by


def _block(channels: int, filters: int) -> list[torch.nn.Module]:
    """ActNorm and the residual block after it."""
    branch = nf.nets.LipschitzCNN(
        [channels, filters, filters, channels], [3, 1, 3], lipschitz_const=_NORM
    )
    return [nf.flows.ActNorm((channels, 1, 1)), nf.flows.Residual(branch, reduce_memory=True)]
