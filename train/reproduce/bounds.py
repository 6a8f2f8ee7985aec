"""Lemma 2 and the log-det bounds on trained networks.

A block F = I + g with Lip(g) ≤ L < 1 has Lip(F) ≤ 1 + L and Lip(F⁻¹) ≤ 1/(1 − L) (Lemma 2), and
d·log(1 − L) ≤ log|det ∂F| ≤ d·log(1 + L). The singular values and determinants of I + J at test
data must lie within.
"""

from collections.abc import Sequence

import numpy as np

from iresnet_jax import log_det_bounds
from train.reproduce.crops import Site, first_scale_sites, jacobians
from train.reproduce.result import Context, Result, Row

_NAMES = ("checkerboard", "mnist", "cifar10")


def run(context: Context) -> Result:
    """One row a block of every density model's first scale, and whether its bounds hold."""
    count = context.by_scale(smoke=4, cpu=16, paper=64)
    names = context.by_scale(smoke=_NAMES[:2], cpu=_NAMES, paper=_NAMES)
    blocks, rows = [], []
    for name in names:
        saved = context.trainings.density(name).load(max_examples=count)
        flow, _ = saved.functions.shipped_flow(saved.state)
        test = saved.dataset.test[:count]
        x = saved.program.network_images(saved.config, saved.dataset, test)[0]
        of_network = [{"data": name, **check(site)} for site in first_scale_sites(flow, x)]
        rows.append(_summary(name, of_network))
        blocks += of_network
    note = (
        "All blocks of a model's first scale, images cropped to 8×8, float64. Tightest: the "
        "measured value over its bound, the largest over blocks and inputs. Published: a theorem, "
        "so every bound must hold. Each block's numbers are in curves.csv."
    )
    return Result(rows, curves=blocks, note=note)


def check(site: Site) -> Row:
    """The extreme values at all inputs, beside their bounds."""
    matrices = np.eye(site.dim) + jacobians(site)
    singular = np.linalg.svd(matrices, compute_uv=False)
    log_dets = np.linalg.slogdet(matrices)[1]
    lipschitz = site.lipschitz
    low, high = (float(bound) for bound in log_det_bounds(lipschitz, site.dim))
    forward, inverse = float(singular.max()), float(1.0 / singular.min())
    return {
        "block": site.name,
        "d": site.dim,
        "L": lipschitz,
        "Lip(F)": forward,
        "1 + L": 1.0 + lipschitz,
        "Lip(F⁻¹)": inverse,
        "1/(1 − L)": 1.0 / (1.0 - lipschitz),
        "d·log(1 − L)": low,
        "smallest log|det|": float(log_dets.min()),
        "largest log|det|": float(log_dets.max()),
        "d·log(1 + L)": high,
        "holds": bool(
            forward <= 1.0 + lipschitz
            and inverse <= 1.0 / (1.0 - lipschitz)
            and low <= log_dets.min()
            and log_dets.max() <= high
        ),
    }


def _summary(name: str, blocks: Sequence[Row]) -> Row:
    def tightest(value: str, bound: str) -> float:
        return round(max(block[value] / block[bound] for block in blocks), 3)

    return {
        "data": name,
        "blocks": len(blocks),
        "published": "holds",
        "measured": "holds" if all(block["holds"] for block in blocks) else "VIOLATED",
        "largest L": round(max(block["L"] for block in blocks), 4),
        "tightest: Lip(F)": tightest("Lip(F)", "1 + L"),
        "tightest: Lip(F⁻¹)": tightest("Lip(F⁻¹)", "1/(1 − L)"),
        "tightest: log|det| below": tightest("smallest log|det|", "d·log(1 − L)"),
        "tightest: log|det| above": tightest("largest log|det|", "d·log(1 + L)"),
    }
