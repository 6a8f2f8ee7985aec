"""Files that PyTorch wrote, read without running their code."""

import builtins

import numpy as np
import pytest

from iresnet_jax.interop.state_dicts import plain, read_state_dict


@pytest.fixture
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


def test_a_file_gives_its_arrays(torch, tmp_path):
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "alone.pt")
    torch.save({"state_dict": layer.state_dict(), "step": 7}, tmp_path / "held.pt")
    for name in ("alone.pt", "held.pt"):
        state = read_state_dict(tmp_path / name)
        assert set(state) == {"weight", "bias"}
        np.testing.assert_array_equal(state["weight"], layer.weight.detach().numpy())


def test_bfloat16_and_parameters_are_read(torch, tmp_path):
    """NumPy has no bfloat16."""
    weight = torch.nn.Parameter(torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
    torch.save({"weight": weight}, tmp_path / "half.pt")
    np.testing.assert_array_equal(read_state_dict(tmp_path / "half.pt")["weight"], [1.5, -2.0])


def test_whole_models_and_other_things_are_refused(torch, tmp_path):
    torch.save({"model": torch.nn.Linear(3, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match=r"pickled.pt holds more than tensors"):
        read_state_dict(tmp_path / "pickled.pt")
    torch.save({"steps": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is no state dict, and holds none under 'state_dict'"):
        read_state_dict(tmp_path / "other.pt")


def test_without_pytorch_the_cure_is_told(monkeypatch):
    own = builtins.__import__

    def lacking(name, *rest):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return own(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ModuleNotFoundError, match="needs torch: pip install torch") as raised:
        read_state_dict("model.pt")
    assert raised.value.name == "torch"


def test_names_of_several_devices_and_what_is_no_array():
    assert set(plain({"module.a": [1.0], "b": np.ones(2)})) == {"a", "b"}
    with pytest.raises(ValueError, match="not finite for b"):
        plain({"b": np.array([np.inf])})
    with pytest.raises(TypeError, match="names to arrays; got list"):
        plain([1.0])
    with pytest.raises(TypeError, match="b of the state dict is no array of numbers"):
        plain({"b": "text"})
