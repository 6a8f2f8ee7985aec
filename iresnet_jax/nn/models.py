"""Flax models: flows over vectors and images; the classifier is :mod:`iresnet_jax.nn.classifier`.

``model.init(key, x)`` returns a model's variables (ActNorm initialised from ``x``), and
``model.flow(variables)`` the invertible network as a pure pytree,
:class:`~iresnet_jax.flows.Flow`, whose methods evaluate, invert and sample. In training,
``flow, state = model.advance(variables)`` lets the power iterations advance.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from iresnet_jax.bijections import Bijection, Chain
from iresnet_jax.checks import check_at_least_one, check_domain, check_shape
from iresnet_jax.flows import Flow, Latents
from iresnet_jax.nn.activations import named_module
from iresnet_jax.nn.branches import Sequential, bottleneck_branch, dense_branch
from iresnet_jax.nn.constraints import Normalize, check_normalize
from iresnet_jax.nn.monotone import Monotone
from iresnet_jax.nn.stack import Stack
from iresnet_jax.nn.variables import Variables, apply
from iresnet_jax.priors import DiagonalGaussian
from iresnet_jax.spectral import check_coeff
from iresnet_jax.stages import Activation, Precision
from iresnet_jax.transforms import Center, Logit, Squeeze
from iresnet_jax.types import AnyArray, Samples

#: Makes a residual branch, a Flax module, of the channels of input and output, the widths inside,
#: and the options of :func:`~iresnet_jax.nn.dense_branch` by name, but for ``activate_first``. The
#: network's first block leaves out the activation, given by its name, that its branch begins with.
BranchFactory = Callable[..., nn.Module]

#: Where the network works: on data as they are, on x − ½, or on the logit of x in [0, 1].
Domain = Literal["real", "centered", "logit"]
_DOMAINS: dict[str, tuple[Bijection, ...]] = {
    "real": (),
    "centered": (Center(),),
    "logit": (Logit(),),
}


class FlowModel(nn.Module, kw_only=True):
    """What all models share.

    Attributes:
      coeff: norm to allow for each layer, in (0, 1); None for an unconstrained network, which has
        no guaranteed inverse.
      activation: a name, see :class:`~iresnet_jax.nn.Sequential`.
      actnorm: whether every block begins with ActNorm.
      num_steps: power-iteration steps a training step.
      normalize: what constrained kernels are divided by, in training too: "estimate", the power
        iteration's of their norm, or "bound", a rigorous one on it; see
        :class:`~iresnet_jax.nn.SpectralConv`, and :func:`~iresnet_jax.nn.shrink` for the end of
        training.
      axis_name: mapped axis over which ActNorm's initial statistics, and a classifier's BatchNorm,
        are averaged.
      precision: "float32", or "tensorfloat32" or "bfloat16" inside the branches; parameters,
        singular vectors, log-determinants' sums and priors stay in float32.
      remat: whether the backward pass recomputes blocks: less memory; docs/PERFORMANCE.md has
        what it costs.
      make_branch: makes the branches: :func:`~iresnet_jax.nn.dense_branch` for vectors,
        :func:`~iresnet_jax.nn.bottleneck_branch` for images, or a :data:`BranchFactory` of yours;
        see :class:`~iresnet_jax.nn.Stack` for what it may return.
      mixing: whether every block mixes its channels by an invertible 1×1 convolution, after
        ActNorm; see :class:`~iresnet_jax.mixing.Invertible1x1`.
      monotone: whether blocks are :class:`~iresnet_jax.nn.Monotone` ones, with the same branches.
    """

    describes_itself: ClassVar[bool] = True

    coeff: float | None = 0.9
    activation: str = "elu"
    actnorm: bool = True
    num_steps: int = 1
    normalize: Normalize = "estimate"
    axis_name: str | None = None
    precision: Precision = "float32"
    remat: bool = False
    make_branch: BranchFactory = dense_branch
    mixing: bool = False
    monotone: bool = False

    def flow(self, variables: Variables) -> Flow:
        """Return the invertible network that these variables describe, as a pure pytree.

        Its power iterations stand still: differentiating its kernels is refused, since a training
        step is to :meth:`advance` them.

        Raises:
          ValueError: for variables that do not fit the model.
          TypeError: for anything but a mapping.
        """
        flow: Flow = apply(self, variables)
        return flow

    def advance(self, variables: Variables) -> tuple[Flow, Variables]:
        """Return the network of a training step, its power iterations advanced, and its new state.

        The state is all collections but the parameters: the next step's variables are
        ``{"params": new_params, **state}``.

        Raises:
          ValueError, TypeError: as :meth:`flow`.
        """
        flow, updates = apply(self, variables, mutable=["spectral"])
        state = {name: value for name, value in variables.items() if name != "params"}
        return flow, {**state, **updates}

    def pure(self, x: Samples | None = None) -> Flow:
        """Return the network as a pytree, from within a module; see :meth:`flow`.

        Args:
          x: a batch to initialise ActNorm from; used at initialisation alone.
        """
        raise NotImplementedError

    def _forward(self, x: AnyArray) -> Latents:
        return self.pure(self._checked(x) if self.is_initializing() else None).forward(x)

    def _checked(self, x: AnyArray) -> Samples:
        """The data, refused where they do not fit; every model says what fits."""
        raise NotImplementedError

    def _stack(self, index: int, depth: int, channels: int, features: object) -> Stack:
        """The blocks of a scale, a module."""
        branch = self._branch(channels, features)  # unbound below: it is the stack's
        branch = branch.clone(parent=None, _deep_clone=True, _reset_names=True)
        branch = branch if hasattr(branch, "pure") else Sequential((branch,), parent=None)
        return Stack(
            Monotone(branch, parent=None) if self.monotone else branch,
            depth,
            self.actnorm,
            self.axis_name,
            self.remat,
            first_block_activated=index > 0,
            label=f"scale {index}",
            mixing=self.mixing,
            name=_scale_name(index),
        )

    def _branch(self, channels: int, features: object) -> nn.Module:
        """One branch of a scale."""
        return self.make_branch(
            channels,
            features,
            coeff=self.coeff,
            num_steps=self.num_steps,
            normalize=self.normalize,
            activation=self.activation,
            precision=self.precision,
        )

    def _priors(self, shapes: Sequence[tuple[int, ...]]) -> tuple[DiagonalGaussian, ...]:
        zeros = nn.initializers.zeros
        return tuple(
            DiagonalGaussian(
                self.param(f"prior_mean_{i}", zeros, shape),
                self.param(f"prior_log_std_{i}", zeros, shape),
            )
            for i, shape in enumerate(shapes)
        )

    def _check_settings(self, depths: Sequence[int]) -> None:
        check_coeff(self.coeff)
        check_normalize(self.normalize)
        if isinstance(named := named_module(self.activation), str):
            Activation(named)
        if self.num_steps < 0:
            raise ValueError(f"num_steps of power iteration must be ≥ 0; got {self.num_steps}.")
        if not (row := _row_of_integers("depths", depths)) or min(row) < 1:
            raise ValueError(f"Every scale has at least one block; got depths {row}.")
        if not self.is_initializing():
            self._check_no_surplus(depths)

    def _check_no_surplus(self, depths: Sequence[int]) -> None:
        built = {_scale_name(i) for i in range(len(depths))}
        stored = {name for name in self.variables.get("params", {}) if name.startswith("scale")}
        if surplus := sorted(stored - built):
            raise ValueError(
                f"The variables hold {', '.join(surplus)}, which this model, of depths "
                f"{tuple(depths)}, does not have: they are of another model."
            )


class VectorFlow(FlowModel, kw_only=True):
    """A flow over vectors: residual blocks of dense layers, and a Gaussian prior.

    Attributes:
      dim: dimensions of the data.
      depth: number of blocks.
      features: hidden widths of each branch; one number for a single hidden layer.
    """

    dim: int
    depth: int = 10
    features: int | Sequence[int] = (64, 64, 64)

    def __call__(self, x: AnyArray) -> Latents:
        """Map data [batch, dim] to latents; at initialisation ``x`` sets ActNorm."""
        return self._forward(x)

    @nn.compact
    def pure(self, x: Samples | None = None) -> Flow:
        return self._flow(x)

    def _flow(self, x: Samples | None) -> Flow:
        self._check_settings([self.depth])
        check_at_least_one("dim", self.dim)
        features = self.features
        widths = _row_of_integers(
            "features", (features,) if isinstance(features, int) else features
        )
        if min(widths, default=1) < 1:
            raise ValueError(f"features must be widths ≥ 1; got {widths}.")
        stack = self._stack(0, self.depth, self.dim, widths).pure((self.dim,), x)
        return Flow((Chain((stack,)),), (self.dim,), self._priors([(self.dim,)]))

    def _checked(self, x: AnyArray) -> Samples:
        check_shape(x, (self.dim,))
        check_domain(x, unit_interval=False)
        return jnp.asarray(x)


class ImageNetwork(FlowModel, kw_only=True):
    """Residual blocks over images at several resolutions: what flow and classifier share.

    Attributes:
      image_shape: (height, width, channels).
      depths: number of blocks of each scale.
      features: channels inside the branches, one number for all scales or one for each.
      squeeze_first: whether the first scale, too, begins with a squeeze.
      domain: "real", "centered" (x − ½) or "logit"; images lie in [0, 1] unless it is "real".
    """

    image_shape: tuple[int, int, int]
    depths: Sequence[int] = (6, 6, 6)
    features: int | Sequence[int] = 48
    squeeze_first: bool = True
    domain: Domain = "centered"
    make_branch: BranchFactory = bottleneck_branch

    def _checked(self, x: AnyArray) -> Samples:
        check_shape(x, self.image_shape)
        check_domain(x, unit_interval=self.domain != "real")
        return jnp.asarray(x)

    def _entrance(self) -> tuple[Bijection, ...]:
        """What is done to images before the first scale."""
        if self.domain not in get_args(Domain):
            names = ", ".join(get_args(Domain))
            raise ValueError(f"domain must be one of {names}; got {self.domain!r}.")
        return _DOMAINS[self.domain]

    def _levels(self, x: Samples | None, factor_out: bool) -> tuple[Bijection, ...]:
        """The scales, each a level where half of the channels leave between them, else all one."""
        self._check_settings(self.depths)
        self._check_image_shape()
        shape, levels = tuple(self.image_shape), []
        for i, features in enumerate(self._features()):
            before = self._entrance() if i == 0 else ()
            before += (Squeeze(),) if i > 0 or self.squeeze_first else ()
            x = None if x is None else Chain(before).forward(x)
            shape = Chain(before).out_shape(shape)
            stack = self._stack(i, self.depths[i], shape[-1], features).pure(shape, x)
            levels.append((*before, stack))
            x = None if x is None else stack.forward(x)
            if factor_out and i < len(self.depths) - 1:
                shape = (*shape[:-1], shape[-1] - shape[-1] // 2)
                x = None if x is None else x[..., -shape[-1] :]
        if factor_out:
            return tuple(Chain(links) for links in levels)
        return (Chain(tuple(link for links in levels for link in links)),)

    def _check_image_shape(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                "image_shape must be (height, width, channels), each ≥ 1; "
                f"got {tuple(self.image_shape)}."
            )
        height, width, _ = self.image_shape
        multiple = 2 ** (len(self.depths) - (not self.squeeze_first))
        if height % multiple or width % multiple:
            raise ValueError(
                f"A squeeze needs even image sides; got height {height}, width {width}, and with "
                f"{len(self.depths)} scales they must be multiples of {multiple}."
            )

    def _features(self) -> tuple[int, ...]:
        count = len(self.depths)
        features = self.features
        row = (features,) * count if isinstance(features, int) else features
        widths = _row_of_integers("features", row)
        if len(widths) != count or min(widths) < 1:
            raise ValueError(
                f"features must be one number ≥ 1, or one for each of {count} scales; got {widths}."
            )
        return widths


class ImageFlow(ImageNetwork, kw_only=True):
    """The paper's multi-scale flow over images in [0, 1], with a learned Gaussian prior.

    Every scale squeezes (space to depth), then runs its residual blocks; half of the channels leave
    after every scale but the last.

    Attributes:
      factor_out: whether half of the channels leave between scales.
    """

    factor_out: bool = True

    def __call__(self, x: AnyArray) -> Latents:
        """Map images [batch, *image_shape] to latents; at initialisation ``x`` sets ActNorm."""
        return self._forward(x)

    @nn.compact
    def pure(self, x: Samples | None = None) -> Flow:
        flow = Flow(self._levels(x, self.factor_out), tuple(self.image_shape))
        return dataclasses.replace(flow, priors=self._priors(flow.latent_shapes()))


def _scale_name(index: int) -> str:
    """Under which a scale's blocks are stored."""
    return f"scale{index}_blocks"


def num_parameters(variables: Variables) -> int:
    """Count the trainable numbers that the variables hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def _row_of_integers(name: str, values: object) -> tuple[int, ...]:
    """Refuse anything but a row of integers, by a TypeError."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a row of integers ≥ 1, such as (4, 4); got {values!r}.")
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        raise TypeError(f"{name} must be integers ≥ 1; got {tuple(values)!r}.") from None
