"""Checkpoints: what is kept, what is refused, and a run killed at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from train.__main__ import main
from train.checkpoints import CheckpointError, Checkpoints
from train.steps import TrainState


def state(value):
    params = {"w": np.full((2, 3), value, np.float32)}
    return TrainState(np.int32(value), params, {}, (np.zeros(2),), {"params": params})


def save(checkpoints, scores):
    for step, score in scores.items():
        checkpoints.save(step, state(step), {"next_index": step}, score)
    checkpoints.close()


@pytest.mark.parametrize(("best", "kept"), [("min", [2, 4, 5]), ("max", [1, 4, 5])])
def test_the_newest_and_the_best_are_kept(tmp_path, best, kept):
    scores = {1: 9.0, 2: 1.0, 3: 5.0, 4: 6.0, 5: 4.0}
    save(Checkpoints(tmp_path, keep=2, best=best), scores)
    again = Checkpoints(tmp_path, keep=2, best=best)
    assert again.steps() == kept
    assert again.best_step() == kept[0]
    again.close()


@pytest.mark.parametrize(("best", "sign", "expected"), [("min", -1.0, 2), ("max", 1.0, 1)])
def test_scores_that_an_earlier_version_saved_still_count(tmp_path, best, sign, expected):
    """They lay with the data, negated where less is better."""
    scores = {1: 9.0, 2: 1.0, 3: 5.0}
    save(Checkpoints(tmp_path, keep=3, best=best), scores)
    for step, score in scores.items():
        folder = tmp_path / "checkpoints" / str(step)
        shutil.rmtree(folder / "metrics")
        data = folder / "data" / "metadata"
        data.write_text(json.dumps(json.loads(data.read_text()) | {"score": sign * score}))
    again = Checkpoints(tmp_path, keep=3, best=best)
    assert again.best_step() == expected
    again.close()


def test_what_is_read_is_what_was_saved(tmp_path):
    save(Checkpoints(tmp_path), {3: 0.0, 7: 0.0})
    checkpoints = Checkpoints(tmp_path)
    saved = checkpoints.restore(state(0))
    assert isinstance(saved.state, TrainState) and saved.state.step == 7
    np.testing.assert_array_equal(saved.state.params["w"], state(7).params["w"])
    assert saved.data == {"next_index": 7}
    assert checkpoints.read(3, state(0)).state.step == 3
    checkpoints.close()


def test_nothing_saved_is_nothing_restored(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state(0)) is None and checkpoints.best_step() is None
    checkpoints.close()


def damage(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")


def test_checkpoints_that_cannot_be_read_are_moved_aside_and_can_be_saved_again(tmp_path, capsys):
    save(Checkpoints(tmp_path), {1: 0.0, 2: 0.0})
    damage(tmp_path / "checkpoints" / "2")
    (tmp_path / "checkpoints" / "7").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state(0)).state.step == 1
    told = capsys.readouterr().out
    assert "Checkpoint 2 cannot be read" in told and "Checkpoint 7 cannot be read" in told
    aside = tmp_path / "unreadable-checkpoints"
    assert f"Checkpoint 2 was moved to {aside / '2'}" in told
    assert (aside / "7").is_dir()
    assert any(
        file.read_bytes() == b"damaged" for file in (aside / "2").rglob("*") if file.is_file()
    )
    save(checkpoints, {2: 0.0})
    again = Checkpoints(tmp_path)
    assert again.restore(state(0)).state.step == 2
    again.close()


def test_a_save_that_a_kill_cut_off_is_passed_over_and_can_be_made_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {}, 0.0)
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    cut_off = shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp-7")
    (cut_off / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1] and checkpoints.restore(state(0)).state.step == 1
    checkpoints.save(2, state(2), {}, 0.0)
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(state(0)).state.step == 2


def test_a_checkpoint_of_another_structure_is_kept_too(tmp_path):
    """A later version may have written it: it is not damaged, only not readable here."""
    save(Checkpoints(tmp_path), {1: 0.0})
    later, checkpoints = state(2)._replace(params={"other": np.ones(3)}), Checkpoints(tmp_path)
    checkpoints.save(2, later, {}, 0.0)
    checkpoints.close()
    for aside in ("2", "2.1"):
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.restore(state(0)).state.step == 1
        checkpoints.save(2, later, {}, 0.0)
        checkpoints.close()
        moved = tmp_path / "unreadable-checkpoints" / aside / "state"
        assert moved.is_dir() and any(moved.iterdir())


def test_where_none_can_be_read_none_is_removed(tmp_path):
    save(Checkpoints(tmp_path), {1: 0.0, 2: 0.0})
    damage(tmp_path / "checkpoints")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"None of the checkpoints \(steps \[2, 1\]\)"):
        checkpoints.restore(state(0))
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="not finite after step 1"):
        checkpoints.save(1, state(1)._replace(params={"w": jnp.array([0.0, jnp.nan])}), {}, 0.0)
    assert checkpoints.steps() == []
    checkpoints.close()


# Killed

_ARGUMENTS = [
    *("density", "--dataset", "moons", "--depths", "2", "--features", "8", "--batch-size", "32"),
    *("--steps", "160", "--checkpoint-every", "5", "--validate-every", "80"),
    *("--max-examples", "200", "--num-reconstructed", "16", "--num-samples", "16"),
]


def _start(workdir):
    command = [sys.executable, "-m", "train", *_ARGUMENTS, "--workdir", str(workdir)]
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        command, cwd=root, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _checkpoint_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def _killed_while_training(workdir, rng):
    """Kill a run a random moment after it has saved something new; whether it was still running."""
    before, process = max(_checkpoint_steps(workdir), default=0), _start(workdir)
    while process.poll() is None and max(_checkpoint_steps(workdir), default=0) <= before:
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.3))
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def _unfinished(workdir):
    return set((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _killed_while_saving(workdir):
    """Kill a run that stands still in the middle of a save; whether there was one."""
    before, process, left = _unfinished(workdir), _start(workdir), set()
    while not left and process.poll() is None:
        time.sleep(0.001)
        if _unfinished(workdir) - before:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
            left = _unfinished(workdir) - before
            process.send_signal(signal.SIGKILL if left else signal.SIGCONT)
    process.wait()
    return bool(left)


def _report(workdir):
    """Run to the end, in this process."""
    assert main([*_ARGUMENTS, "--workdir", str(workdir)]) == 0
    return json.loads((workdir / "report.json").read_text())


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_never_killed(tmp_path):
    whole = _report(tmp_path / "whole")
    rng = random.Random(0)
    assert _killed_while_training(tmp_path / "killed", rng), "it ended before it was killed"
    assert _killed_while_saving(tmp_path / "killed"), "it was never seen to save"
    report = _report(tmp_path / "killed")
    assert report["steps"] == whole["steps"] == 160
    assert report["parameters_sha256"] == whole["parameters_sha256"]
    assert report["bits_per_dim"] == whole["bits_per_dim"]
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
