"""Paths, signals, pipes and devices, as the command line takes them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import typing

import jax
import pytest

import train.__main__
from iresnet_jax.nn.constraints import Normalize
from train.__main__ import main
from train.arguments import GROUPS, as_typed
from train.catalogue import TOOLS, settings_of
from train.configs import CLASSIFICATION, DENSITY, HYBRID, DensityConfig, base
from train.failures import Stopped, _watching, terminable
from train.parallel import check_devices
from train.processes import start_processes


@pytest.mark.parametrize("spelled", ["--workdir=~/x", "--workdir ~/x", "--work_dir=~/x"])
def test_a_home_folder_is_expanded(spelled, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(train.__main__, "train", seen.append)
    assert main(["density", *spelled.replace("work_dir", "workdir").split()]) == 0
    assert seen[0].workdir == tmp_path / "x"


@pytest.mark.parametrize("given", [["--workdir="], ["--workdir", ""], ["--data_dir", " "]])
def test_an_empty_path_is_refused(given, monkeypatch, capsys):
    monkeypatch.setattr(train.__main__, "train", lambda config: None)
    assert main(["density", *given]) == 2
    assert "must be a path" in capsys.readouterr().err


def test_sigterm_ends_a_program_with_its_status(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train.__main__, "train", lambda _: signal.raise_signal(signal.SIGTERM))
    assert main(["density"]) == 143 and "resumes" in capsys.readouterr().err
    with pytest.raises(Stopped), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_ends_early_ends_the_program_quietly(tmp_path, monkeypatch, capsys):
    class Closed:
        def __init__(self, file):
            self.fileno = file.fileno

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(train.__main__, "main", lambda: 0)
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr("sys.stdout", Closed(file))
        assert train.__main__._piped() == 141


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":1", "host:x", "host:70000"])
def test_a_coordinator_without_a_port_is_refused(coordinator):
    with pytest.raises(ValueError, match=r"coordinator must be host:port.*got "):
        start_processes(coordinator, 2, 1)


def test_a_coordinator_that_does_not_answer_is_given_up(capsys):
    with pytest.raises(ValueError, match=r"localhost:1 did not answer for 0\.05 s"):
        start_processes("localhost:1", 2, 1, limit=0.05)
    assert "Waiting for the processes at localhost:1, 0.05 s at most" in capsys.readouterr().err


def test_a_platform_that_is_not_here_is_named(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ValueError, match="JAX_PLATFORMS is cuda"):
        check_devices()


# Settings as they are typed


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("target_bias must lie in (0, 1); got -1.", "--target-bias must lie in (0, 1); got -1."),
        ("steps must be ≥ 1; got 0.", "--steps must be ≥ 1; got 0."),
        ("a run (coeff: 0.9 there, 0.5 here; steps: 3 there, 4 here)",
         "a run (--coeff: 0.9 there, 0.5 here; --steps: 3 there, 4 here)"),
        ("importance_samples = 8 needs eval_estimator exact",
         "--importance-samples = 8 needs --eval-estimator exact"),
    ],
)  # fmt: skip
def test_settings_are_named_as_they_are_typed(message, typed):
    assert as_typed(message, DensityConfig) == as_typed(typed, DensityConfig) == typed


@pytest.mark.parametrize(
    "message",
    [
        "after 3 steps the seed was lost",
        "There is no config 'batch_size'. Known: digits",
        "runs/max_examples/run cannot be written",
        "runs/num_terms.npz cannot be read",
        "--max-draws must be even",
        "the images must be square",
        "There is no file 'of my num_terms run': move it",
    ],
)
def test_what_is_no_setting_stays(message):
    assert as_typed(message, DensityConfig) == message


def test_a_message_of_a_tool_names_its_own_options_alone(tmp_path, capsys):
    assert main(["sample", "--workdir", str(tmp_path), "--count", "0"]) == 2
    assert "error: --count must be ≥ 1; got 0." in capsys.readouterr().err


# --help


def test_help_needs_no_jax():
    """Of all that it imports, JAX, Orbax and the tasks would take seconds."""
    code = (
        "import sys; from train.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        "try: main(['density', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'orbax', 'flax', 'iresnet_jax', 'matplotlib', 'train.training'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_every_setting_is_in_one_group():
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert len(grouped) == len(set(grouped))
    configs = (DENSITY["digits"], CLASSIFICATION["digits"], HYBRID["digits"])
    assert set(grouped) == {name for config in configs for name in vars(config)}


def test_help_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["density", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    titles = re.findall(r"^\W*([\w-]+)? ?options\b", "\n".join(lines), re.MULTILINE)
    assert titles[1:] == ["data", "run", "network", "training", "likelihood", "log-determinant",
                          "inverse", "evaluation", "machine"]  # fmt: skip


def test_the_catalogue_says_what_the_tools_are(capsys):
    from train import tools

    assert set(TOOLS) == {*tools.TOOLS, "compare", "export"}
    for name in (*tools.TOOLS, "compare"):
        told = " ".join((settings_of(name).__doc__ or "").split("\n\n")[0].split())
        assert told[:1].lower() + told[1:].removesuffix(".") == TOOLS[name]
    assert typing.get_args(base.Normalize) == typing.get_args(Normalize)


# Signals while native code runs


def test_a_signal_is_seen_while_native_code_runs(capfd):
    with _watching(patience=0.05):
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        killer.start()
        time.sleep(0.4)
        killer.join()
        signal.signal(signal.SIGTERM, before)
    assert "SIGTERM is seen" in capfd.readouterr().err


def test_a_signal_that_is_answered_is_not_told_twice(capfd):
    with pytest.raises(Stopped), terminable():
        signal.raise_signal(signal.SIGTERM)
    time.sleep(0.05)
    assert "is seen" not in capfd.readouterr().err
