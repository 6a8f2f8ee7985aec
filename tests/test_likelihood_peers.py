"""What ``python -m benchmarks to-likelihood`` trains and evaluates, against the packages' own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from benchmarks.accelerator.records import Record
from benchmarks.likelihood.cells import GRID, Cell
from benchmarks.likelihood.clock import LAST, Clock, Watch
from benchmarks.likelihood.methods import METHODS
from benchmarks.likelihood.problems import Problem, Split
from benchmarks.likelihood.problems import read as read_problem

CELL = Cell(data="wine", method="fit", size="smoke")


@pytest.fixture
def problem():
    """A correlated Gaussian in the plane."""
    rng = np.random.default_rng(0)
    mix = np.array([[1.0, 0.5], [0.0, 2.0]])
    parts = [Split((rng.normal(size=(1, n, 2)) @ mix).astype(np.float32)) for n in (150, 60, 30)]
    return Problem.of(parts)


def watched(tmp_path, problem, steps, seconds=1e9):
    """A watch, and the record that it fills; every step is looked at."""
    record = Record(tmp_path / "cell.json")
    watch = Watch(record, Clock(-1e8), problem, seconds=seconds, most_steps=steps)
    return watch, record


@pytest.mark.slow
def test_fit_is_the_same_watched(tmp_path, problem):
    from benchmarks.likelihood import front_door

    watch, record = watched(tmp_path, problem, steps=None)
    model = ir.nn.VectorFlow(dim=2, depth=2, features=(8, 8))
    train, validation = (part.points[0] for part in (problem.train, problem.validation))
    settings = {"validation": validation, "max_epochs": 3, "batch_size": 75, "progress": False}
    fitted, _ = ir.fit(jax.random.key(0), model, train, **settings)
    make_step = front_door.fitting.make_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front_door.fitting, "make_step", front_door._watched(problem, watch))
        again, history = ir.fit(jax.random.key(0), model, train, **settings)
    assert front_door.fitting.make_step is make_step
    test = problem.test.points[0]
    np.testing.assert_array_equal(again.log_prob(test), fitted.log_prob(test))
    assert history.ended_by == "max_epochs" and record.parts["method"]["parameters"] > 0
    (point,) = (part for name, part in record.parts.items() if name.startswith("point"))
    assert point["steps"] == 1  # due at once: this clock is years ahead


@pytest.mark.slow
def test_fit_ships_what_it_has_when_the_seconds_are_over(tmp_path, problem):
    from benchmarks.likelihood import front_door

    watch, record = watched(tmp_path, problem, steps=2)
    with pytest.warns(UserWarning, match="interrupted in epoch"):
        front_door.run({}, CELL, problem, watch)
    assert record.parts[LAST]["steps"] == 2 and math.isfinite(record.parts[LAST]["test"])


def test_the_configs_of_programs_are_those_that_come_along():
    from benchmarks.likelihood.programs import config_of
    from train.configs.density import DENSITY

    learned = METHODS["program-learned"]
    cell = Cell(data="digits", method="program-learned")
    assert config_of({**learned.options, **learned.default}, cell) == DENSITY["digits"]
    cell = Cell(data="mnist", method="program-learned")
    assert config_of({**learned.options, **learned.default}, cell) == DENSITY["mnist-small"]
    short = Cell(data="mnist", method="program-uniform", setting=GRID[0])
    found = config_of(short.options(), short)
    assert found.dequantization == "uniform" and found.steps == 4000 / 4 / 2
    smaller = config_of(short.options(), Cell(data="mnist-small", method="program-uniform"))
    assert smaller.depths == (4, 4) and smaller.features == (32, 32)


@pytest.mark.slow
def test_flowjax_is_trained_as_by_its_own_loop():
    pytest.importorskip("flowjax", exc_type=ImportError)
    import optax
    from flowjax.train import fit_to_data
    from flowjax.train.train_utils import train_val_split

    from benchmarks.likelihood import flowjax_peer

    key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (500, 2)) * 3.0 + 1.0
    flow = flowjax_peer.flow_of(key, 2, {"flow": "bnaf", "block_dim": 4})
    theirs, losses = fit_to_data(key, flow, x, learning_rate=0.1, max_epochs=9, show_progress=False)
    later, subkey = jax.random.split(key)
    (train,), (validation,) = train_val_split(subkey, [x])
    parts = flowjax_peer.partitioned(flow)
    optimizer = optax.adam(0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowjax_peer, "MAX_EPOCHS", 9)
        for now in flowjax_peer.training(
            later, parts, lambda: train, validation, optimizer, fixed=True
        ):
            last = now
    assert last.losses == losses
    ours = flowjax_peer._whole(last.best, parts[1]).log_prob(x)
    np.testing.assert_array_equal(ours, theirs.log_prob(x))


@pytest.mark.slow
def test_flowjax_stops_when_its_own_loop_stops():
    pytest.importorskip("flowjax", exc_type=ImportError)
    import optax

    from benchmarks.likelihood import flowjax_peer

    parts = flowjax_peer.partitioned(
        flowjax_peer.flow_of(jax.random.key(0), 2, {"flow": "bnaf", "block_dim": 2})
    )
    train, validation = jnp.zeros((100, 2)), 5.0 * jnp.ones((100, 2))  # only gets worse
    optimizer = optax.sgd(1e-3)
    steps = flowjax_peer.training(
        jax.random.key(0), parts, lambda: train, validation, optimizer, fixed=True
    )
    *_, last = steps
    assert len(last.losses["val"]) == 1 + flowjax_peer.MAX_PATIENCE + 1


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", exc_type=ImportError)


@pytest.mark.slow
def test_an_exact_log_determinant_is_that_of_the_jacobian(torch):
    from benchmarks.likelihood.torch_training import exact_log_det

    torch.manual_seed(0)
    branch = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    branch, x = branch.double(), torch.randn(4, 3, dtype=torch.float64)
    g, found = exact_log_det(branch, x)
    torch.testing.assert_close(g, branch(x).detach())
    for one, value in zip(x, found, strict=True):
        matrix = torch.autograd.functional.jacobian(lambda y: y + branch(y), one)
        assert float(value) == pytest.approx(math.log(abs(float(torch.det(matrix)))), abs=1e-12)


@pytest.mark.slow
def test_normflows_is_evaluated_as_by_its_own_determinant_in_the_plane(torch):
    pytest.importorskip("normflows", exc_type=ImportError)
    from benchmarks.likelihood.residual_peer import exact_log_prob, model_of
    from benchmarks.likelihood.torch_training import in_double

    torch.manual_seed(0)
    model = model_of(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(16, 2, dtype=torch.float64)
    model = in_double(model)
    model.log_prob(x)  # initialises ActNorm
    own = model.log_prob(x).detach()
    torch.testing.assert_close(exact_log_prob(model, x), own, rtol=0.0, atol=1e-10)


@pytest.mark.slow
def test_convolutions_are_evaluated_by_the_jacobian_of_the_whole_flow(torch):
    pytest.importorskip("normflows", exc_type=ImportError)
    from benchmarks.likelihood.residual_conv_peer import ConvolutionalFlow
    from benchmarks.likelihood.torch_training import in_double

    torch.manual_seed(0)
    model = ConvolutionalFlow((4, 4, 1), (1, 1), 5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(32, 16, dtype=torch.float64)
    model = in_double(model)
    model.log_prob(x)  # initialises ActNorm
    found = model.log_prob(x, exact=True).detach()

    def latent(one):
        y = one.reshape(1, 4, 4, 1).permute(0, 3, 1, 2)
        for scale in model.scales:
            y = torch.nn.functional.pixel_unshuffle(y, 2).contiguous()
            for flow in scale:
                y = y + flow.iresblock.nnet(y) if hasattr(flow, "iresblock") else flow.inverse(y)[0]
        return y.flatten()

    for one, value in zip(x[:3], found, strict=False):
        log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(latent, one))[1]
        prior = -0.5 * (latent(one).detach().square() + math.log(2.0 * math.pi)).sum()
        assert float(value) == pytest.approx(float(prior + log_det), abs=1e-9)


@pytest.mark.slow
def test_convolutions_are_converted_to_the_same_density(torch):
    pytest.importorskip("normflows", exc_type=ImportError)
    from benchmarks.likelihood.converted_peer import certified_log_prob, converted, squeezed
    from benchmarks.likelihood.residual_conv_peer import ConvolutionalFlow
    from benchmarks.likelihood.torch_training import in_double

    torch.manual_seed(0)
    model = ConvolutionalFlow((4, 4, 1), (2, 1), 5)
    x = torch.randn(32, 16)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    flow = converted(state, (4, 4, 1), 0.97)
    expected = in_double(model).log_prob(x.double(), exact=True).detach().numpy()
    found = flow.log_prob(jnp.asarray(squeezed(x.numpy(), (4, 4, 1))))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    log_prob, by = certified_log_prob(state, (4, 4, 1), 0.97)
    many = np.repeat(x.numpy()[:1], 4000, axis=0)
    drawn = log_prob(many)
    assert "roulette" in by.lower()
    assert abs(drawn.mean() - expected[0]) < 5.0 * drawn.std() / math.sqrt(len(drawn)) + 1e-4


@pytest.mark.slow
def test_batches_go_through_the_data_once_an_epoch_with_new_noise(torch):
    from benchmarks.likelihood.problems import Entrance
    from benchmarks.likelihood.torch_training import batches

    problem = read_problem("digits", smoke=True)
    entrance = Entrance(np.zeros(64), np.ones(64))
    stream = batches(problem, entrance, 50, seed=0)
    first, second = (np.concatenate([next(stream).numpy() for _ in range(3)]) for _ in range(2))
    levels = problem.train.levels.reshape(150, 64)

    def in_order(x):
        return np.array(sorted(np.floor(x * 17 + 1e-4).tolist()))

    expected = np.array(sorted(levels.astype(float).tolist()))
    assert (in_order(first) != expected).mean() < 1e-2  # noise of nearly 1 is rounded up
    assert (first != second).any(axis=1).all()


@pytest.mark.slow
def test_flow_matching_learns_a_gaussian(torch):
    zuko = pytest.importorskip("zuko", exc_type=ImportError)
    from benchmarks.likelihood.torch_training import descend
    from benchmarks.likelihood.zuko_peer import matching_loss

    torch.manual_seed(0)
    flow = zuko.flows.CNF(1, hidden_features=[32, 32])
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(600):
        descend(matching_loss(flow, 0.5 * torch.randn(256, 1) + 2.0), optimizer)
    x = 0.5 * torch.randn(2000, 1) + 2.0
    with torch.no_grad():
        found = -flow().log_prob(x).mean()
    entropy = 0.5 * math.log(2.0 * math.pi * math.e * 0.25)
    assert entropy - 0.05 < float(found) < entropy + 0.05
