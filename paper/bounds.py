"""Lemma 2 and the log-det bounds on trained networks.

A block F = I + g with Lip(g) ≤ L < 1 has Lip(F) ≤ 1 + L and Lip(F⁻¹) ≤ 1/(1 − L) (Lemma 2), and
d·log(1 − L) ≤ log|det ∂F| ≤ d·log(1 + L). The singular values and determinants of I + J at test
data must lie within these bounds.
"""

import numpy as np

from iresnet_jax import log_det_bounds
from paper.blocks import Site, first_scale_sites, jacobians
from paper.pieces import Context, Result, Row

_NAMES = ("checkerboard", "mnist", "cifar10")
#: Measured value -> its bound.
_BOUNDS = {
    "Lip(F)": "1 + L",
    "Lip(F⁻¹)": "1/(1 − L)",
    "smallest log|det|": "d·log(1 − L)",
    "largest log|det|": "d·log(1 + L)",
}


def run(context: Context) -> Result:
    """Check the bounds for every block in the first scale of every density model."""
    count = context.by_scale(smoke=4, cpu=16, paper=64)
    blocks, rows = [], []
    for name in context.by_scale(smoke=_NAMES[:2], cpu=_NAMES, paper=_NAMES):
        network = context.trainings.density(name).network(count)
        checked = [check(site) for site in first_scale_sites(network.flow, network.x)]
        tightest = {
            f"tightest: {value}": round(max(row[value] / row[bound] for row in checked), 3)
            for value, bound in _BOUNDS.items()
        }
        rows.append(
            {
                "data": name,
                "blocks": len(checked),
                "published": "holds",
                "measured": "holds" if all(row["holds"] for row in checked) else "VIOLATED",
                "largest L": round(max(row["L"] for row in checked), 4),
                **tightest,
            }
        )
        blocks += [{"data": name, **row} for row in checked]
    note = (
        "All blocks of a model's first scale, images cropped to 8×8, float64. Tightest: the "
        "largest ratio of measured value to bound, over blocks and inputs. Published: a theorem, "
        "so every bound must hold. Each block's numbers are in curves.csv."
    )
    return Result(rows, curves=blocks, note=note)


def check(site: Site) -> Row:
    """Measure the extreme values over all inputs, beside their bounds."""
    matrices = np.eye(site.dim) + jacobians(site)
    singular = np.linalg.svd(matrices, compute_uv=False)
    log_dets = np.linalg.slogdet(matrices)[1]
    low, high = (float(bound) for bound in log_det_bounds(site.lipschitz, site.dim))
    row: Row = {
        "block": site.name,
        "d": site.dim,
        "L": site.lipschitz,
        "Lip(F)": float(singular.max()),
        "1 + L": 1.0 + site.lipschitz,
        "Lip(F⁻¹)": float(1.0 / singular.min()),
        "1/(1 − L)": 1.0 / (1.0 - site.lipschitz),
        "d·log(1 − L)": low,
        "smallest log|det|": float(log_dets.min()),
        "largest log|det|": float(log_dets.max()),
        "d·log(1 + L)": high,
    }
    above = ("Lip(F)", "Lip(F⁻¹)", "largest log|det|")
    within = all(row[value] <= row[_BOUNDS[value]] for value in above)
    return {**row, "holds": within and low <= row["smallest log|det|"]}
