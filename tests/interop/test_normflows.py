"""Residual flows of normflows, a PyTorch package with the layers of residual-flows."""

import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.interop.residual_flows import flow_from_residual_flows

COEFF, DEPTH = 0.9, 3


@pytest.fixture(scope="module")
def theirs():
    """Trained for a few steps, so that constraints are active, and then frozen."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    normflows = pytest.importorskip("normflows", exc_type=ImportError)
    torch.manual_seed(0)
    flows = []
    for _ in range(DEPTH):
        net = normflows.nets.LipschitzMLP([2, 8, 8, 2], COEFF, init_zeros=False)
        flows += [normflows.flows.Residual(net, brute_force=True), normflows.flows.ActNorm(2)]
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(2, False), flows)
    x = torch.randn(256, 2) * torch.tensor([3.0, 0.2]) + 1.0
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model.forward_kld(x).backward()
        optimizer.step()
        normflows.utils.update_lipschitz(model, 5)
    model.eval()
    return model, x[:16]


def renamed(state):
    """As residual-flows names it: from the data on, which is their last flow."""
    found = {}
    for index in range(2 * DEPTH):
        own = f"flows.{2 * DEPTH - 1 - index}."
        mine = {name.removeprefix(own): x for name, x in state.items() if name.startswith(own)}
        if "s" in mine:  # (x − t)·exp(−s)
            found[f"chain.{index}.weight"] = -mine["s"].reshape(-1)
            found[f"chain.{index}.bias"] = -mine["t"].reshape(-1)
            found[f"chain.{index}.initialized"] = np.int64(1)
        else:
            for name, x in mine.items():
                inner = name.removeprefix("iresblock.").replace("nnet.net.", "nnet.")
                found[f"chain.{index}.{inner}"] = x
    return found


def test_latents_and_densities_are_theirs(theirs):
    model, x = theirs
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    flow = flow_from_residual_flows(renamed(state), (2,), COEFF)
    own = jnp.asarray(x.numpy())
    expected = model.inverse(x).detach().numpy()
    np.testing.assert_allclose(flow.forward(own)[0], expected, rtol=0, atol=1e-5)
    log_prob = model.log_prob(x).detach().numpy()
    np.testing.assert_allclose(flow.log_prob(own), log_prob, rtol=0, atol=1e-4)
    assert ir.certify(flow).certified
