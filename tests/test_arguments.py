"""Paths, signals, pipes and devices, as the command line takes them."""

import signal

import jax
import pytest

import train.__main__
from train.__main__ import main
from train.failures import Stopped, terminable
from train.parallel import check_devices, start_processes


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
