"""Figure 5 and the appendix: samples of the density models, at several temperatures."""

import jax
import numpy as np

from train.reproduce import plots
from train.reproduce.published import A_PICTURE
from train.reproduce.result import Context, Result

_DATASETS = ("mnist", "cifar10")
_SMOKE = _DATASETS[:1]


def run(context: Context) -> Result:
    """Draw grids of samples, with held-out images beside them."""
    count = context.by_scale(smoke=4, cpu=36, paper=64)
    rows, grids = [], []
    for dataset in context.by_scale(smoke=_SMOKE, cpu=_DATASETS, paper=_DATASETS):
        saved = context.trainings.density(dataset).load(max_examples=count)
        flow, _ = saved.functions.shipped_flow(saved.state)
        grids.append(
            [(f"{saved.dataset.name}: held-out data", saved.dataset.test / _levels(saved))]
        )
        for temperature in context.temperatures:
            samples, info = saved.functions.sample(flow, jax.random.key(0), count, temperature)
            grids[-1].append((f"temperature {temperature:g}", np.clip(samples, 0.0, 1.0)))
            rows.append(
                {
                    "data": dataset,
                    "temperature": temperature,
                    "published": A_PICTURE,
                    "measured: inverses converged": f"{_converged(info)} of {count}",
                    "branch evaluations a block, at most": int(np.max(info.num_steps)),
                    "mean of the pixels": round(float(np.mean(samples)), 3),
                }
            )
    return Result(rows, [plots.image_grids(context.folder / "figure-5.png", grids)])


def _levels(saved) -> float:
    return float(saved.dataset.num_levels - 1)


def _converged(info) -> int:
    return int(np.asarray(info.converged).all(axis=0).sum())
