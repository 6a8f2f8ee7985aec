"""``python -m train reproduce``: the program, its trainings, and the tables made of them."""

import dataclasses
import json
import math

import jax
import pytest

from paper import convergence, images, tables, trainings
from paper.pieces import Context, Piece, Result
from paper.program import PIECES
from paper.tables import name_of
from paper.trainings import Training, Trainings, classifier_config, density_config
from train.__main__ import main
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_coupling_classifier_trains_and_reports(digits):
    report = digits.coupling("cifar10", 3000).report
    assert 0.0 <= report["accuracy"] <= 1.0 and report["steps"] == 2
    assert report["reconstruction_max_error"] < 1e-3
    assert report["reconstructions_finite"] == 64 and 0.5 < report["smallest_scale"] < 1.0


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
