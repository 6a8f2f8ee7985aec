"""The accelerator's benchmark: what it keeps, what it resumes, and what it does without."""

import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.accelerator import child, command
from benchmarks.accelerator.records import COMPLETE, Record, read
from benchmarks.accelerator.settings import Settings
from train.batches import batch_iterator
from train.data import Dataset
from train.metrics import MetricsLog


def test_every_figure_is_on_disk_as_soon_as_it_is_known(tmp_path, capsys):
    path = tmp_path / "item.json"
    record = Record(path)
    record.add("first", seconds=0.123456)
    assert json.loads(path.read_text()) == {"first": {"seconds": 0.123456}}
    assert "first: seconds 0.1235" in capsys.readouterr().out


def test_a_measurement_resumes_and_tries_again_what_failed(tmp_path):
    record = Record(tmp_path / "item.json")
    record.add("first", seconds=1.0)
    record.add("second", error="out of memory")
    record.complete()
    resumed = Record(tmp_path / "item.json")
    assert "first" in resumed and "second" not in resumed
    assert COMPLETE not in resumed.parts
    resumed.add("second", seconds=2.0)
    resumed.complete()
    assert COMPLETE in read(tmp_path / "item.json")


def test_settings_survive_the_way_to_another_process(tmp_path):
    settings = Settings(out=tmp_path, size="tiny", minutes=0.5, mnist=tmp_path / "mnist.npz")
    assert Settings.from_json(settings.to_json()) == settings


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "rates.json").write_text(json.dumps({"machine": {"devices": 1}, COMPLETE: {}}))
    measured = []
    monkeypatch.setattr(command, "_measure", lambda item, *_: measured.append(item))
    assert main(["accelerator", "--out", str(tmp_path), "--only", "rates", "inverse"]) == 1
    assert measured == ["inverse"]  # which then failed to write anything
    assert "| rates | machine | devices 1 |" in (tmp_path / "table.md").read_text()
    assert main(["accelerator", "--out", str(tmp_path), "--only", "rates"]) == 0


def test_what_does_not_hold_fails_the_command(tmp_path, monkeypatch):
    found = {"norms": {"holds": False}, COMPLETE: {}}
    (tmp_path / "numerics.json").write_text(json.dumps(found))
    assert main(["accelerator", "--out", str(tmp_path), "--only", "numerics"]) == 1


def test_nothing_starts_when_the_minutes_are_over(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("measured"))
    main(["accelerator", "--out", str(tmp_path), "--minutes", "0", "--only", "rates"])


@pytest.mark.parametrize("file", [[], ["--mnist", "nothing.npz"]])
@pytest.mark.parametrize("item", ["train-mnist", "mnist-rate"])
def test_training_without_its_images_is_refused_and_not_called_done(tmp_path, capsys, item, file):
    with pytest.raises(SystemExit):
        main(["accelerator", "--out", str(tmp_path), "--size", "tiny", "--only", item, *file])
    assert f"{item} needs --mnist FILE.npz" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--mnist FILE\.npz was not given"):
        child.main(item, Settings(out=tmp_path, size="tiny"))
    assert COMPLETE not in read(tmp_path / f"{item}.json")


@pytest.mark.parametrize("minutes", ["nan", "inf", "-1"])
def test_minutes_that_are_none_are_refused(tmp_path, capsys, minutes):
    with pytest.raises(SystemExit):
        main(["accelerator", "--out", str(tmp_path), f"--minutes={minutes}"])
    assert f"must be a number ≥ 0; got {minutes}" in capsys.readouterr().err


def test_results_of_one_size_are_not_shown_for_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_measure", lambda *_: None)
    arguments = ["accelerator", "--out", str(tmp_path), "--only", "rates"]
    for _ in range(2):
        assert main([*arguments, "--size", "tiny"]) == 1  # nothing was written
    assert main(arguments) == 2
    assert "has results of --size tiny" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["accelerator", "tpu"])
def test_a_folder_that_cannot_be_is_told_in_a_sentence(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    (tmp_path / "file").touch()
    assert main([name, "--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}")


def test_full_networks_are_not_measured_on_a_cpu(tmp_path):
    with pytest.raises(SystemExit, match="no accelerator here, only a CPU"):
        child.main("rates", Settings(out=tmp_path))
    assert not (tmp_path / "rates.json").exists()


def test_a_platform_that_is_not_there_is_told_in_a_sentence(tmp_path, monkeypatch):
    def none():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(SystemExit, match="error: JAX finds no device"):
        child.main("rates", Settings(out=tmp_path, size="tiny"))


def test_an_item_measures_in_this_process(tmp_path):
    child.main("rates", Settings(out=tmp_path, size="tiny"))
    found = read(tmp_path / "rates.json")
    assert found["machine"]["platform"] == "cpu" and COMPLETE in found
    assert all(found[name]["tflop_per_second"] > 0 for name in ("bfloat16", "float32"))


def test_every_item_has_a_function(monkeypatch):
    for item, (module, function) in child.ITEMS.items():
        if module != "torch_steps":  # imports PyTorch
            imported = __import__(f"benchmarks.accelerator.{module}", fromlist=[function])
            assert callable(getattr(imported, function)), item
    assert command.SECONDS.keys() < child.ITEMS.keys()


@pytest.fixture
def without_grain(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)


def numbers(count):
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return Dataset("numbers", images, images[:1], images[:1], num_levels=256)


def test_without_grain_numpy_shuffles(without_grain, capsys):
    batches = batch_iterator(numbers(10), 3, 0, with_labels=False)
    assert "grain is not installed" in capsys.readouterr().out
    epochs = [np.concatenate([next(batches).ravel() for _ in range(3)]) for _ in range(2)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1])


def test_without_grain_batches_resume_exactly(without_grain):
    batches = batch_iterator(numbers(10), 3, 0, with_labels=False)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = batch_iterator(numbers(10), 3, 0, with_labels=False)
    resumed.set_state(state)
    for _ in range(5):
        assert (next(resumed) == next(batches)).all()


def test_without_grain_processes_share_a_batch(without_grain):
    whole = batch_iterator(numbers(10), 4, 0, with_labels=False)
    parts = [
        batch_iterator(numbers(10), 4, 0, with_labels=False, process_index=i, process_count=2)
        for i in range(2)
    ]
    for _ in range(3):
        assert (np.concatenate([next(part) for part in parts]) == next(whole)).all()


def test_a_run_shuffled_by_one_is_not_resumed_by_the_other(monkeypatch):
    by_grain = batch_iterator(numbers(10), 3, 0, with_labels=False)
    next(by_grain)
    state = by_grain.get_state()
    monkeypatch.setitem(sys.modules, "grain", None)
    by_numpy = batch_iterator(numbers(10), 3, 0, with_labels=False)
    with pytest.raises(ValueError, match="Grain, which is not installed"):
        by_numpy.set_state(state)
    with pytest.raises(ValueError, match="without Grain"):
        by_grain.set_state(by_numpy.get_state())


def test_without_tensorboard_the_metrics_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = MetricsLog(tmp_path, 0)
    log.write(1, loss=2.0)
    log.picture(1, "samples", np.zeros((2, 2, 3)))
    log.close()
    assert "tensorboardX is not installed" in capsys.readouterr().out
    assert MetricsLog(tmp_path, 1).records() == [{"step": 1, "loss": 2.0}]
