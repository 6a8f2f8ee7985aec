"""A run's page without a run: a report, a certificate and metrics as files hold them."""

import dataclasses
import json
import math
from html.parser import HTMLParser

import numpy as np

from train import figures
from train.configs import DENSITY
from train.density import likelihood_rows
from train.page import Page, write_page
from train.workdir import jsonable

CONFIG = dataclasses.replace(DENSITY["digits"], depths=(2, 1), features=(8, 8), seed=3)

REPORT = {
    "bits_per_dim": 1.83870408,
    "bits_per_dim_stderr": 0.00198560,
    "bits_per_dim_target_stderr": 0.002,
    "bits_per_dim_bias_bound": 0.00099999,
    "bits_per_dim_target_bias": 0.001,
    "bits_per_dim_sampling_stderr": 0.0129291,
    "log_det_description": "24 to 73 terms a block",
    "likelihood_draws": 10,
    "likelihood_examples": 360,
    "reconstruction_max_error": 8.4e-06,
    "inverse_steps_max": 27,
    "all_converged": True,
    "inverse_error_bound_guaranteed": 1.9e10,
    "data_diameter": 6.85,
    "latent_residual_estimate_max": 3.78e-05,
    "inverse_error_in_double_guaranteed": 0.0123,
    "inverse_error_in_double_examples": 64,
    "block_lipschitz_max": 0.9105149,
    "certified": True,
    "samples_converged": True,
    "pictures": ["samples.png", "reconstructions.png", "walk.png"],
    "schedule": "a constant",
    "steps": 1400,
    "interrupted": False,
    "num_parameters": 239008,
    "parameters_sha256": "6a93" * 16,
    "train_seconds": 83.1,
    "total_seconds": 127.7,
    "python": "3.11.7",
    "packages": {"jax": "0.10.2"},
    "device": "cpu (cpu)",
    "num_devices": 2,
}


def certificate(num_blocks=3, problem=""):
    """As JSON holds it: the first layer of each block is looser than the one before."""
    blocks = [
        {
            "name": f"scale 0, block {i}",
            "lipschitz": 0.75 + i / 64,
            "product": 0.9375,
            "forward": 1.25,
            "inverse": math.inf if problem else 6.5,
            "problem": problem,
            "layers": [
                {
                    "name": f"scale 0, block {i}, layer {j}",
                    "sigma": 0.96 - 0.01 * i - 0.001 * j,
                    "upper_bound": 0.96999,
                    "path": f".stages[{j}]",
                }
                for j in range(3)
            ],
        }
        for i in range(num_blocks)
    ]
    ends = {"forward_lipschitz": 5.4e7, "inverse_lipschitz": "inf" if problem else 4.8e13}
    return {"certified": not problem, **ends, "problems": [], "blocks": blocks}


def records(count=100):
    rng = np.random.default_rng(0)
    found = [
        {"step": 10 * i, "loss": 3.0 / (1 + i / 20) + 0.1 * rng.random(), "learning_rate": 0.02}
        for i in range(1, count + 1)
    ]
    found += [
        {"step": s, "validation": 2.0 - s / 2000, "sigma": 0.9702, "inverse_residual": 1e-6}
        for s in (1, 500, 1000)
    ]
    return found


def made(folder, report=REPORT, config=CONFIG, data="one"):
    """A run's folder as training leaves it, without pictures and checkpoints."""
    folder.mkdir(parents=True)
    content = jsonable(dataclasses.replace(config, workdir=folder)) | {"data_sha256": data}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "report.json").write_text(json.dumps(report))
    lines = "".join(json.dumps(record) + "\n" for record in records(20))
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def draw(folder):
    """Draw a run's pictures."""
    images = np.random.default_rng(0).random((64, 8, 8, 1))
    figures.samples_beside_data(folder / "samples.png", images, images[::-1])
    figures.reconstructions(folder / "reconstructions.png", images, images + 1e-6, 8.4e-6)
    figures.image_grids(folder / "walk.png", [[("", images)]], 8)


def page(folder, config=CONFIG, report=REPORT, proved=None, **changes):
    evaluated = "certified" in report
    told = likelihood_rows(report) if evaluated else []
    proved = (proved or certificate()) if evaluated else None
    parts = {"what": "images", "curve_name": "bits/dim", **changes}
    return Page(config, report, told, records(), proved, folder, **parts)


class Checker(HTMLParser):
    """Collects what a page consists of, and what is wrong with it."""

    VOID = ("meta", "img", "link", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.wrong, self.ids, self.texts = [], [], []
        self.headings, self.addresses, self.targets = [], [], []
        self.language = None
        self._open = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is never closed" for tag in self._open]
        self.wrong += [f"id {i} twice" for i in self.ids if self.ids.count(i) > 1]
        self.wrong += [f"#{t} leads nowhere" for t in self.targets if t not in self.ids]

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if len(found) < len(attributes):
            self.wrong.append(f"<{tag}> repeats an attribute")
        self._read(tag, found)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._read(tag, dict(attributes))

    def _read(self, tag, found):
        self.ids += [found["id"]] if "id" in found else []
        addresses = [found[name] for name in ("src", "href", "xlink:href") if name in found]
        self.targets += [a[1:] for a in addresses if a.startswith("#")]
        self.addresses += [a for a in addresses if not a.startswith(("#", "data:"))]
        self.addresses += [v for v in found.values() if v and "//" in v.split("base64,")[0]]
        if tag == "img" and not found.get("alt"):
            self.wrong.append("a picture without alt")
        if tag == "svg" and not found.get("aria-label"):
            self.wrong.append("a curve without a label")
        if tag == "html":
            self.language = found.get("lang")
        if tag in ("script", "iframe", "object", "embed", "form"):
            self.wrong.append(f"<{tag}>")
        if tag[0] == "h" and tag[1:].isdigit():
            self.headings.append(int(tag[1:]))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def checked(path):
    """Read a page, check what every page must be, and return what is in it."""
    found = Checker(path.read_text(encoding="utf-8"))
    assert not found.wrong and not found.addresses
    assert found.language == "en" and found.headings[0] == 1 and found.headings.count(1) == 1
    steps = zip(found.headings, found.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps)
    return found


def whole_page(folder):
    """Write a page with all that a page can have; return its path."""
    draw(folder)
    write_page(folder / "report.html", page(folder))
    return folder / "report.html"
