"""One table of named models, and what tests of any flow need of each, computed once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax import ActNorm, Chain, Exact, Flow, Residual, Stack
from iresnet_jax.nn import ImageFlow, InvertibleClassifier, VectorFlow

BATCH = 3
KEY = jax.random.key(0)
EXACT = Exact()

#: What runs once, on tiny arrays, is not worth optimising: a third of the compile time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def image_flow(image_shape=(4, 4, 1), depths=(1, 1), features=3, **settings) -> ImageFlow:
    return ImageFlow(image_shape=image_shape, depths=depths, features=features, **settings)


#: Every setting of every model appears in at least one of them.
MODELS = {
    "vector": VectorFlow(dim=3, depth=3, features=(5, 4)),
    "vector-depth-1": VectorFlow(dim=2, depth=1, features=(4,)),
    "vector-without-actnorm": VectorFlow(dim=2, depth=2, features=(4,), actnorm=False),
    "vector-no-hidden-layer": VectorFlow(dim=3, depth=2, features=(), coeff=0.5),
    **{
        f"vector-{name}": VectorFlow(dim=2, depth=2, features=(3,), activation=name)
        for name in ("tanh", "relu", "lipswish")
    },
    "image": image_flow((4, 4, 3), depths=(1, 2), features=(3, 4)),
    "image-logit": image_flow((2, 4, 2), depths=(2,), domain="logit"),
    "image-odd-channels-leave": image_flow(
        (4, 4, 3), squeeze_first=False, features=2, activation="softplus"
    ),
    "image-without-factor-out": image_flow(
        (4, 8, 1), factor_out=False, actnorm=False, domain="real", coeff=0.7
    ),
    "classifier": InvertibleClassifier(image_shape=(4, 4, 1), depths=(1,), features=3),
}

DENSITIES = [name for name in MODELS if name != "classifier"]

#: Models that repeat what others show, in one setting that has tests of its own.
REPEATED = ("vector-depth-1", "vector-tanh", "vector-relu", "vector-lipswish")
REPEATED += ("vector-no-hidden-layer", "image", "image-without-factor-out", "classifier")


def each_of(names):
    """Parametrise by models, the repeated ones among the slow tests."""
    marks = {name: pytest.mark.slow if name in REPEATED else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


class Built(NamedTuple):
    """A model and its network. The network's weights are NumPy's: slicing them compiles nothing."""

    model: Any
    variables: Any
    flow: Flow
    x: jax.Array


@functools.cache
def build(name: str) -> Built:
    """The model in float32: ActNorm from a batch, then no bias is zero and no prior standard."""
    model = MODELS[name]

    @quick_jit
    def make(key, x):
        variables = model.init(key, x)
        variables = {**variables, "params": shaken(variables["params"])}
        return variables, model.flow(variables)

    variables, flow = make(jax.random.key(1), data(model, 64, seed=0))
    return Built(model, variables, jax.device_get(flow), data(model, BATCH, seed=2))


def data(model, batch: int, seed: int) -> jax.Array:
    """Normal vectors, or images uniform in [0, 1]."""
    rng = np.random.default_rng(seed)
    if isinstance(model, VectorFlow):
        return jnp.asarray(rng.normal(size=(batch, model.dim)), jnp.float32)
    return jnp.asarray(rng.uniform(size=(batch, *model.image_shape)), jnp.float32)


def shaken(params):
    """Parameters moved at random, but for the kernels, whose power iterations have converged."""
    rng = np.random.default_rng(3)

    def move(path, p):
        kernel = path[-1] == jax.tree_util.DictKey("kernel")
        return p if kernel else p + jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype)

    return jax.tree_util.tree_map_with_path(move, params)


def in_double(tree):
    """Every floating-point leaf as float64; call it with x64 enabled."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


class Evaluation(NamedTuple):
    """What a flow in float64 says of a batch; NumPy arrays."""

    latents: tuple
    log_det: Any
    forward_latents: tuple
    jacobian_log_det: Any
    reconstruction: Any
    info: Any


@functools.cache
def evaluate(name: str) -> Evaluation:
    """Forward, Exact log-det, log-det of the full Jacobian and inverse, in float64."""
    built = build(name)

    @quick_jit
    def run(flow, x):
        latents, log_det = flow.forward_and_log_det(x, EXACT)
        back, info = flow.inverse(latents)
        jacobian = jax.vmap(jax.jacfwd(functools.partial(_flat_forward, flow)))(x)
        jacobian = jacobian.reshape(len(x), flow.dim, flow.dim)
        jacobian_log_det = jnp.linalg.slogdet(jacobian)[1]
        return Evaluation(latents, log_det, flow.forward(x), jacobian_log_det, back, info)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(in_double(built.flow), in_double(built.x)))


def _flat_forward(flow, sample):
    return jnp.concatenate([z.ravel() for z in flow.forward(sample[None])])


def links_of(bijection) -> tuple:
    """What a level or a block is made of, first to last."""
    return bijection.links if isinstance(bijection, Chain) else (bijection,)


def stacks_of(flow) -> list[Stack]:
    links = [link for level in flow.levels for link in links_of(level)]
    return [link for link in links if isinstance(link, Stack)]


def residual_of(block) -> Residual:
    """The residual part of a block, with its branch."""
    (residual,) = (link for link in links_of(block) if isinstance(link, Residual))
    return residual


def actnorm_of(block) -> ActNorm | None:
    return next((link for link in links_of(block) if isinstance(link, ActNorm)), None)


class Walk(NamedTuple):
    """What a network computes on its way.

    Attributes:
      blocks: its blocks in order.
      inputs: what each of their branches sees.
      latents: what comes out, by a rule of one's own for which channels leave.
    """

    blocks: list
    inputs: list
    latents: tuple


def walk(flow, x) -> Walk:
    """Run the network link by link and block by block."""
    blocks, inputs, latents = [], [], []
    for i, level in enumerate(flow.levels):
        for link in links_of(level):
            if not isinstance(link, Stack):
                x = link.forward(x)
                continue
            for block in link.unstacked():
                blocks.append(block)
                inputs.append(x if (norm := actnorm_of(block)) is None else norm.forward(x))
                x = block.forward(x)
        if i < len(flow.levels) - 1:
            latents.append(x[..., : x.shape[-1] // 2])
            x = x[..., x.shape[-1] // 2 :]
    return Walk(blocks, inputs, (*latents, x))


def norms(x) -> np.ndarray:
    """‖x‖₂ of every sample."""
    return np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)


VECTOR = VectorFlow(dim=3, depth=2, features=(4,))
IMAGE = image_flow((4, 4, 1), depths=(1,), features=2)
CLASSIFIER = InvertibleClassifier(
    image_shape=(4, 4, 2), depths=(1, 1), features=3, padding=1, num_classes=4
)


class SmallVariables(dict):
    """Fresh variables of the three small models, made as users make them, when they are needed."""

    def __missing__(self, name):
        seeds = {"vector": (VECTOR, 1), "image": (IMAGE, 2), "classifier": (CLASSIFIER, 3)}
        model, seed = seeds[name]
        self[name] = quick_jit(model.init)(KEY, data(model, 64, seed))
        return self[name]


@functools.cache
def small_variables():
    return SmallVariables()


def init_shapes(model, x, **options):
    """Initialise by shapes alone: enough for every check but that of values."""
    return jax.eval_shape(lambda key, x: model.init(key, x, **options), KEY, x)
