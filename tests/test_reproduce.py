"""``python -m train reproduce``: the program, and the measures behind figures and tables."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_properties
from cases import in_double, quick_jit

from iresnet_jax.nn import ImageFlow, converge, num_parameters
from paper import convergence, coupling, images, tables, trainings
from paper.blocks import first_scale_sites, jacobians, largest_norm, strongest
from paper.bounds import check
from paper.convergence import block_decay
from paper.figure_1 import count_crossings, magnify
from paper.figure_2 import bits_per_dim, coupling_flow, grid_of
from paper.figure_4 import measure
from paper.pieces import Context, Piece, Result
from paper.program import PIECES
from paper.tables import interval, name_of
from paper.trainings import Training, Trainings, classifier_config, density_config
from train.__main__ import main
from train.data import load_dataset
from train.figures import sheet
from train.workdir import WorkdirError


def run(workdir, *arguments):
    return main(["reproduce", "--scale", "smoke", "--workdir", str(workdir), *arguments])


def rows_of(workdir, name):
    """The rows that the program has saved."""
    return json.loads((workdir / "smoke" / name / "done.json").read_text())["rows"]


# The program


@pytest.fixture
def counted(monkeypatch):
    """Two pieces that count how often they are made; the first depends on temperatures."""
    made = []

    def piece(name):
        def make(context):
            made.append(name)
            picture = context.folder / "picture.png"
            picture.write_bytes(b"")
            return Result([{"published": 1, "measured |x|": 2.5}], [picture])

        return make

    monkeypatch.setitem(PIECES, "one", Piece("One", piece("one"), ("temperatures",)))
    monkeypatch.setitem(PIECES, "two", Piece("Two", piece("two")))
    return made


def test_pieces_are_made_once_and_printed_beside_the_published_numbers(tmp_path, counted, capsys):
    assert run(tmp_path, "one", "two") == 0
    assert "published" in capsys.readouterr().out
    assert (tmp_path / "smoke/one/table.csv").read_text() == "published,measured |x|\n1,2.5\n"
    assert run(tmp_path, "one", "two") == 0
    assert counted == ["one", "two"]
    report = (tmp_path / "smoke/report.md").read_text()
    assert "| published | measured \\|x\\| |\n| --- | --- |\n| 1 | 2.5 |" in report


def test_a_piece_is_made_again_when_asked_or_stopped_or_of_other_settings(tmp_path, counted):
    run(tmp_path, "one", "two")
    run(tmp_path, "one", "two", "--temperatures", "0.3")
    assert counted == ["one", "two", "one"]
    run(tmp_path, "two", "--again")
    assert counted == ["one", "two", "one", "two"]
    (tmp_path / "smoke/two/done.json").unlink()  # as if it had been killed before the end
    run(tmp_path, "two")
    assert counted == ["one", "two", "one", "two", "two"]


def test_a_piece_that_fails_does_not_stop_the_others(tmp_path, counted, monkeypatch, capsys):
    def fail(context):
        raise ValueError("no such data")

    monkeypatch.setitem(PIECES, "one", Piece("One", fail))
    assert run(tmp_path, "one", "two") == 1
    assert counted == ["two"]
    assert "one failed: no such data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["figure-9"], "Did you mean 'figure-"), (["--temperatures", "0"], "temperatures must lie")],
)
def test_unknown_pieces_and_settings_out_of_range_are_refused(tmp_path, arguments, message, capsys):
    assert run(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_figure_1_at_smoke_scale(tmp_path):
    assert run(tmp_path, "figure-1") == 0
    folder = tmp_path / "smoke/figure-1"
    standard, invertible = rows_of(tmp_path, "figure-1")
    assert standard["network"] == "standard ResNet"
    assert invertible["crossings measured"] == 0
    assert (folder / "figure-1.png").stat().st_size > 5000
    assert len((folder / "curves.csv").read_text().splitlines()) == 1 + 2 * 41 * 3


# Trainings


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Trainings at smoke scale, smaller still."""
    patch = pytest.MonkeyPatch()
    small = {"depths": (1,), "features": (8,), "steps": 2, "max_examples": 64}

    def shrunk(config):
        return lambda scale, dataset: dataclasses.replace(config(scale, dataset), **small)

    patch.setattr(trainings, "density_config", shrunk(density_config))
    patch.setattr(trainings, "classifier_config", shrunk(classifier_config))
    patch.setattr(jax, "clear_caches", lambda: None)  # so few programs do not exhaust anything
    yield Trainings(tmp_path_factory.mktemp("trainings"), "smoke")
    patch.undo()


def share(trained, workdir):
    """Let the program find models that are trained already."""
    (workdir / "smoke").mkdir()
    (workdir / "smoke/trainings").symlink_to(trained.folder)


def test_pieces_on_a_shared_density_model(digits, tmp_path):
    share(digits, tmp_path)
    assert run(tmp_path, "table-4", "figure-5", "--temperatures", "0.5") == 0
    (row,) = rows_of(tmp_path, "table-4")
    assert row["published bits/dim"] == "not quoted"
    assert 1.0 < row["measured bits/dim"] < 6.0
    assert digits.density("cifar10").workdir == digits.density("mnist").workdir
    (report,) = digits.folder.glob("density-digits-*/report.json")
    assert json.loads(report.read_text())["bits_per_dim"] == pytest.approx(
        row["measured bits/dim"], abs=1e-4
    )


@pytest.mark.slow
def test_pieces_on_a_shared_classifier(digits, tmp_path, monkeypatch):
    share(digits, tmp_path)
    for module in (images, convergence):
        monkeypatch.setattr(module, "COEFFS", (0.9,))
    assert run(tmp_path, "figure-3", "convergence") == 0
    (row,) = rows_of(tmp_path, "figure-3")
    assert row["measured max |error|"] < 1e-4 and row["certified"]
    (row,) = rows_of(tmp_path, "convergence")
    assert 0.0 < row["measured rate"] <= row["L"] < 1.0


@pytest.mark.slow
def test_figure_4_and_the_bounds_on_trained_models(digits, tmp_path):
    share(digits, tmp_path)
    assert run(tmp_path, "figure-4", "bounds") == 0
    rows = rows_of(tmp_path, "figure-4")
    assert [(row["branch"], row["terms"]) for row in rows] == [
        ("trained", 1), ("trained", 5), ("random", 1), ("random", 5)
    ]  # fmt: skip
    for row in rows:
        assert float(row["bias"]) <= float(row["certified bound"])
    rows = rows_of(tmp_path, "bounds")
    assert [row["data"] for row in rows] == ["checkerboard", "mnist"]
    for row in rows:
        assert row["measured"] == "holds" and row["largest L"] < 1.0


class Reported:
    """Trainings that need no training: their test errors in %, and how their inverses end."""

    def __init__(self):
        self.errors = {None: (1.0, 2.0, 6.0), 0.9: (4.0, 4.0, 4.0), 0.5: (8.0, 9.0, 10.0)}

    def classifier(self, dataset, coeff, seed=0):
        report = self._report(dataset, self.errors[coeff][seed], coeff is not None)
        return Training(report | {"reconstruction_max_error": 1e-5 * (1 + seed)}, None)

    def coupling(self, dataset, parameters, seed=0):
        report = self._report(dataset, 3.0 + seed, True) | {"num_parameters": parameters + 1}
        lost = {"reconstruction_max_error": math.nan, "smallest_scale": 0.0}
        return Training(report | lost, None)

    def _report(self, dataset, error, certified):
        return {
            "accuracy": 1.0 - error / 100.0,
            "certified": certified,
            "config": {"dataset": dataset},
            "steps": 7,
            "num_parameters": 100,
        }


def test_table_2_has_the_mean_of_all_seeds_beside_the_published_error(tmp_path):
    result = tables.table_2(Context("cpu", tmp_path, Reported()))
    rows = {(row["data"], row["model"]): row for row in result.rows}
    assert len(rows) == 2 * 3
    for row in result.rows:
        assert row["seeds"] == 3 and row["scale"] == "not comparable with the published scale"
    vanilla, constrained = rows["mnist", name_of(None)], rows["cifar10", name_of(0.9)]
    assert (vanilla["measured error, %"], vanilla["published error, %"]) == (3.0, 0.38)
    assert vanilla["± 95%"] == pytest.approx(6.57, abs=0.01)  # t(2) · √7 / √3
    assert (constrained["measured error, %"], constrained["± 95%"]) == (4.0, 0.0)
    assert constrained["certified"] and not vanilla["certified"]
    assert sorted(
        point["error"] for point in result.curves if point["data"] == "mnist"
    ) == pytest.approx([1.0, 2.0, 4.0, 4.0, 4.0, 6.0, 8.0, 9.0, 10.0])


def test_table_3_says_where_the_coupling_network_is_not_inverted(tmp_path):
    result = tables.table_3(Context("cpu", tmp_path, Reported()))
    coupled, ours = result.rows
    assert (coupled["measured error, %"], ours["measured error, %"]) == (4.0, 4.0)
    assert (coupled["parameters"], ours["parameters"]) == (101, 100)
    assert (coupled["inversion, max |error|"], ours["inversion, max |error|"]) == ("nan", "3e-05")
    assert "at least 0, 0, 0 on those images (by seed)" in result.note


def test_an_interrupted_training_is_resumed_and_a_finished_one_kept(tmp_path, monkeypatch):
    config, calls = classifier_config("smoke", "mnist"), []

    def train(seed=0):
        named = tmp_path / f"run-seed{seed}"
        if seed:
            named.symlink_to(tmp_path / "run-seed0")  # as if it held the run of another seed
        monkeypatch.setattr(trainings, "run", program)
        return Trainings(tmp_path, "smoke")._train(lambda config: config, config, "run", seed)

    def program(config):
        calls.append(len(calls))
        report = {"interrupted": len(calls) == 1}
        (config.workdir / "report.json").write_text(json.dumps(report))
        return report

    with pytest.raises(KeyboardInterrupt):
        train()
    for _ in range(2):
        assert not train().report["interrupted"]
    assert calls == [0, 1]
    with pytest.raises(WorkdirError, match=r"run-seed1 is in the way: delete it.*seed: 0 there, 1"):
        train(seed=1)


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_every_scale_has_configs_that_hold(scale):
    configs = {
        classifier_config: ("mnist", "cifar10", "cifar100"),
        density_config: ("mnist", "cifar10", "checkerboard"),
    }
    for config_of, datasets in configs.items():
        for dataset in datasets:
            config = config_of(scale, dataset)
            config.check()
            digits = scale == "smoke" and dataset != "checkerboard"
            assert config.dataset == ("digits" if digits else dataset)


# Measures


def test_crossings_are_counted_between_layers():
    paths = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.0]])
    assert count_crossings(paths) == 1 + 2 + 0


def test_the_layers_with_the_most_crossings_are_magnified(tmp_path):
    paths = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.3, 0.2, 0.1], [0.0, 1.0, 1.5]])
    with sheet(tmp_path / "x.png") as axes:
        axes[0, 0].plot(paths)
        magnify(axes[0, 0], paths)
    (frame,) = axes[0, 0].child_axes
    assert frame.get_xlim() == (1.0, 3.0) and frame.get_ylim() == (0.0, 2.0)
    for line, path in zip(frame.lines, paths.T, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), path)


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.302652729911275 / math.sqrt(3.0))
    assert math.isnan(interval([1.0])[1])


def test_every_mark_of_table_1_has_its_test():
    for name in tables.PROPERTIES.values():
        assert callable(getattr(test_properties, name))


@pytest.fixture(scope="module")
def image_flow():
    """A flow over 8×8 images with branches of some strength, and its blocks on them."""
    model = ImageFlow(image_shape=(8, 8, 1), depths=(2,), features=4, coeff=0.9)
    x = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)

    @quick_jit
    def make(key, x):
        variables = model.init(key, x)
        kernels = jax.tree.map(lambda leaf: 3.0 * leaf, variables["params"])
        return model.flow(converge(model, {**variables, "params": kernels}))

    flow = make(jax.random.key(0), x)
    return flow, x, first_scale_sites(flow, x)


@pytest.mark.usefixtures("x64")
def test_blocks_on_crops_are_the_networks_own(image_flow):
    flow, x, sites = image_flow
    flow = in_double(flow)
    last = sites[-1]
    output = last.inputs + last.block.branch(jnp.asarray(last.inputs))
    np.testing.assert_allclose(output, flow.forward(jnp.asarray(x, float))[0], atol=1e-12)
    for site in sites:
        assert largest_norm(jacobians(site)) <= site.lipschitz < 1.0


def test_bounds_hold_and_a_false_one_is_noticed(image_flow):
    site = image_flow[2][0]
    assert check(site)["holds"]
    assert not check(site._replace(lipschitz=0.01))["holds"]


def test_the_series_is_measured_within_its_bound(image_flow):
    site = strongest(*image_flow[:2])
    measured = measure(site, 4, 4)
    bias, gradient = measured.series["bias"], measured.series["gradient error"]
    assert (bias <= measured.series["certified bound"]).all() and bias[3] < bias[0]
    assert (measured.series["standard deviation"] > 0.0).all()
    assert gradient[3] < site.lipschitz**3 * gradient[0]


def test_a_block_converges_at_least_as_fast_as_banach_says(image_flow):
    site = strongest(*image_flow[:2])
    decay = block_decay(site, 12)
    for n in range(13):
        assert decay.plain[n] <= site.lipschitz**n * (1.0 + 1e-9)
    assert decay.plain[1] > 1e-3 and decay.jacobian <= site.lipschitz


# Peers


@pytest.fixture(scope="module")
def coupled():
    """A coupling classifier of about 5,000 parameters, fresh, and four images."""
    dataset = load_dataset("digits")
    model = coupling.build_model(classifier_config("smoke", "mnist"), dataset, 5000)
    x = np.random.default_rng(0).normal(size=(4, *dataset.image_shape)).astype("float32")
    return model, jax.device_get(quick_jit(model.init)(jax.random.key(0), x)), x


def test_the_coupling_classifier_inverts_and_has_the_size_asked_for(coupled):
    model, variables, x = coupled
    variables = jax.tree.map(lambda leaf: leaf + np.float32(0.05), variables)
    assert abs(num_parameters(variables) - 5000) < 500
    flow = model.flow(variables)
    back, latents = quick_jit(lambda x: (flow.inverse(flow.features_of(x)), flow.features_of(x)))(x)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert latents.size == x.size * (1 + classifier_config("smoke", "mnist").padding)


def test_the_coupling_classifier_trains_and_reports(digits):
    report = digits.coupling("cifar10", 3000).report
    assert 0.0 <= report["accuracy"] <= 1.0 and report["steps"] == 2
    assert report["reconstruction_max_error"] < 1e-3
    assert report["reconstructions_finite"] == 64 and 0.5 < report["smallest_scale"] < 1.0


def test_a_coupling_whose_scale_underflows_is_reported_as_not_inverted(coupled):
    model, variables, x = coupled
    far = np.concatenate([1e4 * x[:1], x[1:]])
    variables = jax.tree.map(lambda leaf: leaf - np.float32(0.05), variables)
    found = coupling.reconstruction(model, variables, far)
    assert found["smallest_scale"] == 0.0 and found["reconstructions_finite"] == 3
    assert np.isnan(found["reconstruction_max_error"])


def test_the_coupling_flow_is_a_density():
    pytest.importorskip("flowjax")
    points = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    log_prob, _ = coupling_flow(points, layers=2, steps=3, batch_size=16)
    density = grid_of(log_prob, 91)
    assert density.sum() * 0.1**2 == pytest.approx(1.0, abs=1e-2)  # EXTENT holds all but 1e-4
    assert 1.5 < bits_per_dim(log_prob, points) < 3.0
