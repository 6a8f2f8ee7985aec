"""Figure 3: images recovered from a classifier's features. Figure 5: samples of density models."""

import jax
import numpy as np

from paper.pieces import Context, Result
from paper.tables import A_PICTURE, name_of
from train.evaluation import there_and_back
from train.figures import Labelled, image_grids, image_rows

COEFFS: tuple[float | None, ...] = (0.9, 0.7, 0.5, None)
_SHOWN = 10
_DATASETS = ("mnist", "cifar10")


def figure_3(context: Context) -> Result:
    """Recover test images from the features of i-ResNets and of a vanilla ResNet.

    All use the same fixed-point iteration, which converges for Lip(g) < 1 and fails without.
    """
    shown: list[Labelled] = []
    rows = []
    for coeff in COEFFS:
        training = context.trainings.classifier("cifar10", coeff)
        network = training.network(64)
        there = there_and_back(network.functions, network.flow, network.x, fill=False)
        mean, std = np.array(network.config.mean), np.array(network.config.std)
        original, recovered = (np.asarray(x, float) * std + mean for x in (network.x, there.x))
        errors = np.abs(recovered - original).reshape(len(original), -1).max(axis=1)
        shown = shown or [("original", original)]
        shown.append((name_of(coeff), recovered))
        rows.append(
            {
                "model": name_of(coeff),
                "published": "fails" if coeff is None else "reconstructs",
                "measured max |error|": float(f"{errors.max():.3g}"),
                "images within half a grey level": _of(errors < 0.5 / 255),
                "inverses converged": _converged(there.info),
                "certified": training.report["certified"],
            }
        )
    path = context.folder / "figure-3.png"
    context.record(rows)
    image_rows(path, [(label, np.nan_to_num(part[:_SHOWN])) for label, part in shown])
    note = "Images in [0, 1]; half a grey level is 1/510. Shown clipped to [0, 1]."
    return Result(rows, [path], note=note)


def figure_5(context: Context) -> Result:
    """Draw samples at several temperatures, with held-out images beside them."""
    count = context.by_scale(smoke=4, cpu=36, paper=64)
    rows, grids = [], []
    for dataset in context.by_scale(smoke=_DATASETS[:1], cpu=_DATASETS, paper=_DATASETS):
        network = context.trainings.density(dataset).network(count)
        data = network.dataset
        assert data.num_levels is not None
        grids.append([(f"{data.name}: held-out data", data.test / (data.num_levels - 1.0))])
        for temperature in context.temperatures:
            samples, info = network.functions.sample(
                network.flow, jax.random.key(0), count, temperature
            )
            grids[-1].append((f"temperature {temperature:g}", np.asarray(samples)))
            rows.append(
                {
                    "data": dataset,
                    "temperature": temperature,
                    "published": A_PICTURE,
                    "measured: inverses converged": _converged(info),
                    "branch evaluations per block, at most": int(np.max(info.num_steps)),
                    "mean of the pixels": round(float(np.mean(samples)), 3),
                }
            )
    context.record(rows)
    return Result(rows, [image_grids(context.folder / "figure-5.png", grids)])


def _converged(info) -> str:
    return _of(np.asarray(info.converged).all(axis=0))


def _of(hits) -> str:
    return f"{hits.sum()} of {len(hits)}"
