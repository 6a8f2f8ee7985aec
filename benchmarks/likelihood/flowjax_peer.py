"""FlowJAX: ``coupling_flow`` and ``block_neural_autoregressive_flow`` by ``fit_to_data``.

Its loop is written out, with its own step, loss, batches and keys, so that it can be watched; a
test shows that both give the same losses. It ends after 100 epochs, or six without improvement.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import paramax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import block_neural_autoregressive_flow, coupling_flow
from flowjax.train.losses import MaximumLikelihoodLoss
from flowjax.train.train_utils import count_fruitless, get_batches, step

from benchmarks.likelihood.cells import Cell
from benchmarks.likelihood.clock import Watch
from benchmarks.likelihood.methods import Options
from benchmarks.likelihood.problems import Bits, Entrance, Problem, in_parts

#: Defaults of ``fit_to_data``.
MAX_EPOCHS, MAX_PATIENCE, BATCH_SIZE = 100, 5, 100
_AT_ONCE = 1000


class Progress(NamedTuple):
    """Where ``fit_to_data`` stands after a step, or after an epoch.

    Attributes:
      params: as they moved.
      best: of the least validation loss.
      losses: mean training and validation loss of each epoch that is over.
      epoch_over: whether this is the end of an epoch.
    """

    params: Any
    best: Any
    losses: dict[str, list[float]]
    epoch_over: bool


def run(options: Options, cell: Cell, problem: Problem, watch: Watch) -> None:
    """Train until it ends by itself, or the seconds are over; the best parameters are kept."""
    entrance, rng = Entrance.of(problem), np.random.default_rng(cell.seed)
    flow_key, key = jr.split(jr.key(cell.seed))
    params, static = partitioned(flow_of(flow_key, problem.dim, options))
    watch.note(parameters=sum(leaf.size for leaf in jax.tree.leaves(params)))
    log_prob = eqx.filter_jit(lambda params, x: _whole(params, static).log_prob(x))

    def bits_of(params: Any) -> Bits:
        def nats(points: np.ndarray) -> np.ndarray:
            found = in_parts(lambda x: log_prob(params, jnp.asarray(x)), entrance(points), _AT_ONCE)
            return found + entrance.log_det(points)

        return problem.bits_of(nats)

    validation = jnp.asarray(entrance(problem.validation.points[0]))
    best = params
    for now in training(
        key,
        (params, static),
        lambda: jnp.asarray(entrance(problem.drawn(rng))),
        validation,
        optax.adam(options["learning_rate"]),
        fixed=problem.num_levels is None,
    ):
        best = now.best
        if not now.epoch_over:
            watch.step(bits_of(now.params), partial(jax.block_until_ready, now.params))
            if watch.over:
                best = now.best if now.losses["val"] else now.params
                break
    watch.finish(bits_of(best))


def training(
    key: jax.Array,
    parts: tuple[Any, Any],
    train: Callable[[], jax.Array],
    validation: jax.Array,
    optimizer: optax.GradientTransformation,
    *,
    fixed: bool,
) -> Iterator[Progress]:
    """Yield where ``fit_to_data`` stands after each step and each epoch.

    Args:
      key: as it is after ``fit_to_data`` has split the data.
      parts: parameters and all else; see :func:`partitioned`.
      train: the training points of an epoch.
      validation: points held out.
      optimizer: of optax.
      fixed: whether the points are the same in each epoch: they are then shuffled further.
    """
    (params, static), loss_fn = parts, MaximumLikelihoodLoss()
    opt_state, best = optimizer.init(params), params
    losses: dict[str, list[float]] = {"train": [], "val": []}
    points = train()
    for epoch in range(MAX_EPOCHS):
        if epoch and not fixed:
            points = train()
        key, *subkeys = jr.split(key, 3)
        points = jr.permutation(subkeys[0], points)
        validation = jr.permutation(subkeys[1], validation)
        taken = []
        for batch in get_batches([points], BATCH_SIZE)[0]:
            key, subkey = jr.split(key)
            params, opt_state, loss = step(
                params,
                static,
                batch,
                optimizer=optimizer,
                opt_state=opt_state,
                loss_fn=loss_fn,
                key=subkey,
            )
            taken.append(loss)
            yield Progress(params, best, losses, epoch_over=False)
        losses["train"].append((sum(taken) / len(taken)).item())
        taken = []
        for batch in get_batches([validation], BATCH_SIZE)[0]:
            key, subkey = jr.split(key)
            taken.append(eqx.filter_jit(loss_fn)(params, static, batch, key=subkey))
        losses["val"].append((sum(taken) / len(taken)).item())
        if losses["val"][-1] == min(losses["val"]):
            best = params
        yield Progress(params, best, losses, epoch_over=True)
        if count_fruitless(losses["val"]) > MAX_PATIENCE:
            break


def flow_of(key: jax.Array, dim: int, options: Options) -> Any:
    """Return the untrained flow, with FlowJAX's defaults for what the options leave open."""
    base = Normal(jnp.zeros(dim))
    if options["flow"] == "bnaf":
        width = options["block_dim"]
        return block_neural_autoregressive_flow(key, base_dist=base, nn_block_dim=width)
    spline = RationalQuadraticSpline(knots=8, interval=4)
    transformer = spline if options["transformer"] == "spline" else None
    return coupling_flow(key, base_dist=base, transformer=transformer)


def partitioned(flow: Any) -> tuple[Any, Any]:
    """Return the parameters of a flow, and all else."""
    frozen = paramax.NonTrainable
    return eqx.partition(flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, frozen))


def _whole(params: Any, static: Any) -> Any:
    return paramax.unwrap(eqx.combine(params, static))
