"""Flax models: flows over vectors and images; the classifier is :mod:`iresnet_jax.classifier`.

A model stores parameters. ``model.init(key, x)`` returns its variables (ActNorm initialised from
``x``), and ``model.flow(variables)`` the invertible network as a pure pytree,
:class:`~iresnet_jax.flows.Flow`, whose methods evaluate, invert and sample. In training,
``model.apply(variables, method="network", mutable=["spectral"])`` returns the flow and the advanced
power iterations.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import errors

from iresnet_jax.blocks import ResidualStack, as_branch, bottleneck_branch, dense_branch
from iresnet_jax.branches import Activation, Normalize, Precision
from iresnet_jax.checks import check_at_least_one, check_domain, check_shape
from iresnet_jax.flows import Domain, Flow
from iresnet_jax.layers import Constraint, check_normalize
from iresnet_jax.priors import DiagonalGaussian
from iresnet_jax.residual import Scale
from iresnet_jax.spectral import check_coeff

#: Makes a residual branch. It is called with the channels of input and output, the widths inside,
#: and the options of :func:`~iresnet_jax.blocks.dense_branch` by name, but for ``activate_first``.
#: All blocks of a scale are alike, except that the network's first block leaves out the activation,
#: given by its name, that its branch begins with, if it does.
BranchFactory = Callable[..., nn.Module]

_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
)


class FlowModel(nn.Module, kw_only=True):
    """What all models share.

    Attributes:
      coeff: norm to allow for each layer, in (0, 1); None for an unconstrained network, which has
        no guaranteed inverse.
      activation: a name in :data:`iresnet_jax.activations.ACTIVATIONS`.
      actnorm: whether every block begins with ActNorm.
      num_steps: power-iteration steps a training step.
      normalize: what constrained kernels are divided by, in training too: "power", the power
        iteration's estimate of their norm, or "certified", a rigorous bound on it; see
        :class:`iresnet_jax.layers.SpectralConv`, and :meth:`certified` for the end of training.
      axis_name: mapped axis over which ActNorm's initial statistics, and a classifier's BatchNorm,
        are averaged.
      precision: "float32", or "tensorfloat32" or "bfloat16" inside the branches; parameters,
        singular vectors, log-determinants' sums and priors stay in float32.
      remat: whether the backward pass recomputes blocks: less memory; docs/PERFORMANCE.md has
        what it costs.
    """

    coeff: float | None = 0.9
    activation: str = "elu"
    actnorm: bool = True
    num_steps: int = 1
    normalize: Normalize = "power"
    axis_name: str | None = None
    precision: Precision = "float32"
    remat: bool = False

    def flow(self, variables: Any) -> Flow:
        """The invertible network that these variables describe, as a pure pytree.

        Raises:
          ValueError: for variables that do not fit the model.
          TypeError: for anything but a mapping.
        """
        flow = self._network_of(variables)
        assert isinstance(flow, Flow)
        return flow

    def _network_of(self, variables: Any, **options: Any) -> Any:
        """The network, and what changed of collections that are mutable; refuses a misfit."""
        if not isinstance(variables, Mapping):
            raise TypeError(
                "variables must be the mapping of collections that init returned; got "
                f"{type(variables).__name__}."
            )
        try:
            return self.apply(variables, method="network", **options)
        except _MISFITS as error:
            raise ValueError(f"The variables do not fit this model: {error}") from error

    def converge(self, variables: Any) -> Any:
        """The variables with every power iteration run to its tolerance."""
        _, updates = self._network_of(variables, converge=True, mutable=["spectral"])
        return {**variables, **updates}

    def certified(self, variables: Any) -> Any:
        """The variables with every constrained kernel of a norm above its coeff scaled down to it.

        The network that they describe is proved to have Lip(g) ≤ coeff^k in each block of k layers
        (and 1-Lipschitz activations), whatever the singular vectors: the raw kernels themselves
        have :func:`~iresnet_jax.bounds.layer_upper_bound` ≤ coeff, which leaves nothing to the
        power iteration. Weights that are not finite stay as they are. On the host, not under
        ``jit``; for ``precision="bfloat16"`` the rounding of the weights comes on top. A classifier
        is to be :func:`~iresnet_jax.classifier.recalibrated` afterwards: the statistics in its head
        are of the features before.

        Args:
          variables: all that init returned, with converged power iterations where wanted.
        """
        _, state = self._network_of(variables, mutable=["intermediates"])
        constraints, _ = jax.tree_util.tree_flatten_with_path(
            state.get("intermediates", {}), is_leaf=lambda node: isinstance(node, Constraint)
        )
        params = variables["params"]
        for path, constraint in constraints:
            params = _shrunk(params, [entry.key for entry in path[:-1]], constraint)
        return {**variables, "params": params}

    def _build_scale(
        self,
        make_branch: BranchFactory,
        depth: int,
        shape: Sequence[int],
        x: jax.Array | None,
        *,
        index: int,
        converge: bool,
    ) -> tuple[Scale, jax.Array | None]:
        """A scale of ``depth`` blocks, and, at initialisation, ``x`` passed through it."""
        branch = make_branch(
            coeff=self.coeff,
            num_steps=self.num_steps,
            normalize=self.normalize,
            activation=self.activation,
            precision=self.precision,
        )
        module = ResidualStack(
            as_branch(branch),
            depth,
            self.actnorm,
            self.axis_name,
            self.remat,
            first_block_activated=index > 0,
            name=_scale_name(index),
        )
        stack = module(shape, x, converge=converge)
        return Scale((stack,)), None if x is None else stack.forward(x)

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
        Activation(self.activation)
        if self.num_steps < 0:
            raise ValueError(f"num_steps of power iteration must be ≥ 0; got {self.num_steps}.")
        if not depths or min(depths) < 1:
            raise ValueError(f"Every scale has at least one block; got depths {tuple(depths)}.")
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
      features: hidden widths of each branch.
      branch: makes the branches: :func:`~iresnet_jax.blocks.dense_branch`, or a function of yours
        that is called as :data:`BranchFactory` says and returns a Flax module; see
        :class:`~iresnet_jax.blocks.Branch` for what is proved of it.
    """

    dim: int
    depth: int = 10
    features: Sequence[int] = (64, 64, 64)
    branch: BranchFactory = dense_branch

    def __call__(self, x: jax.Array) -> Flow:
        """The flow; at initialisation ``x`` [batch, dim] sets ActNorm."""
        check_shape(x, (self.dim,))
        check_domain(x, unit_interval=False)
        return self.network(x if self.is_initializing() else None)

    @nn.compact
    def network(self, x: jax.Array | None = None, *, converge: bool = False) -> Flow:
        """The flow these variables describe; power iterations advance where they are mutable."""
        self._check_settings([self.depth])
        check_at_least_one("dim", self.dim)
        if min(self.features, default=1) < 1:
            raise ValueError(f"features must be widths ≥ 1; got {tuple(self.features)}.")

        def make_branch(**options) -> nn.Module:
            return self.branch(self.dim, self.features, **options)

        scale, _ = self._build_scale(
            make_branch, self.depth, (self.dim,), x, index=0, converge=converge
        )
        return Flow((scale,), (self.dim,), self._priors([(self.dim,)]))


class ImageNetwork(FlowModel, kw_only=True):
    """Residual blocks over images at several resolutions: what flow and classifier share.

    Attributes:
      image_shape: (height, width, channels).
      depths: number of blocks of each scale.
      features: channels inside the branches, one number for all scales or one for each.
      squeeze_first: whether the first scale, too, begins with a squeeze.
      domain: "real", "centered" (x − 0.5) or "logit"; images lie in [0, 1] unless it is "real".
      branch: makes the branches: :func:`~iresnet_jax.blocks.bottleneck_branch`, or a function of
        yours that is called as :data:`BranchFactory` says and returns a Flax module; see
        :class:`~iresnet_jax.blocks.Branch` for what is proved of it.
    """

    image_shape: tuple[int, int, int]
    depths: Sequence[int] = (6, 6, 6)
    features: int | Sequence[int] = 48
    squeeze_first: bool = True
    domain: Domain = "centered"
    branch: BranchFactory = bottleneck_branch

    def _checked(self, x: jax.Array) -> jax.Array:
        check_shape(x, self.image_shape)
        check_domain(x, unit_interval=self.domain != "real")
        return x

    def _template(self) -> Flow:
        """The network's geometry: a flow whose scales are still empty."""
        squeezes = [i > 0 or self.squeeze_first for i in range(len(self.depths))]
        scales = tuple(Scale((), squeeze) for squeeze in squeezes)
        return Flow(scales, tuple(self.image_shape), domain=self.domain)

    def _build(self, x: jax.Array | None, converge: bool) -> Flow:
        self._check_settings(self.depths)
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                "image_shape must be (height, width, channels), each ≥ 1; "
                f"got {tuple(self.image_shape)}."
            )
        template = self._template()
        shapes = template.scale_shapes()
        x = None if x is None else template.to_network(x)[0]
        scales = []
        for i, (shape, features) in enumerate(zip(shapes, self._features(), strict=True)):

            def make_branch(channels=shape[-1], features=features, **options) -> nn.Module:
                return self.branch(channels, features, **options)

            x = None if x is None else template.scales[i].enter(x)
            scale, x = self._build_scale(
                make_branch, self.depths[i], shape, x, index=i, converge=converge
            )
            x = None if x is None else template.split(x, i)[1]
            scales.append(dataclasses.replace(scale, squeeze=template.scales[i].squeeze))
        return dataclasses.replace(template, scales=tuple(scales))

    def _features(self) -> tuple[int, ...]:
        count = len(self.depths)
        features = self.features
        widths = (features,) * count if isinstance(features, int) else tuple(features)
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

    def __call__(self, x: jax.Array) -> Flow:
        """The flow; at initialisation ``x`` [batch, *image_shape] sets ActNorm."""
        x = self._checked(x)
        return self.network(x if self.is_initializing() else None)

    @nn.compact
    def network(self, x: jax.Array | None = None, *, converge: bool = False) -> Flow:
        """The flow these variables describe; power iterations advance where they are mutable."""
        flow = self._build(x, converge)
        return dataclasses.replace(flow, priors=self._priors(flow.latent_shapes()))

    def _template(self) -> Flow:
        return dataclasses.replace(super()._template(), factor_out=self.factor_out)


def _scale_name(index: int) -> str:
    """Under which a scale's blocks are stored."""
    return f"scale{index}_blocks"


def _shrunk(params: Any, names: Sequence[str], constraint: Constraint) -> Any:
    """The parameters with the kernel of the layer of that name scaled down to its coeff."""
    if names:
        inner = _shrunk(params[names[0]], names[1:], constraint)
        return {**params, names[0]: inner}
    kernel, factors = params["kernel"], constraint.shrink_factors()
    factors = factors.reshape(*factors.shape, *(1,) * (kernel.ndim - factors.ndim))
    return {**params, "kernel": kernel * factors.astype(kernel.dtype)}


def num_parameters(variables: Any) -> int:
    """How many trainable numbers the variables hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
