"""Invertible residual networks in JAX.

Pure functions: :mod:`~iresnet_jax.spectral` (operator norms, estimated),
:mod:`~iresnet_jax.bounds` (operator norms, bounded), :mod:`~iresnet_jax.fixed_point` (the inverse),
:mod:`~iresnet_jax.logdet` (log-determinants), :mod:`~iresnet_jax.transforms`. Networks as pytrees:
:mod:`~iresnet_jax.flows`. Flax models that store their parameters: :mod:`~iresnet_jax.models`,
:mod:`~iresnet_jax.classifier`.
"""

from iresnet_jax.activations import ACTIVATIONS
from iresnet_jax.actnorm import ActNorm
from iresnet_jax.blocks import Branch, ResidualStack, bottleneck_branch, dense_branch
from iresnet_jax.bounds import gram_upper_bound, layer_upper_bound
from iresnet_jax.branches import Activation, Affine, Sequential
from iresnet_jax.certificates import Certificate, certify, certify_flow
from iresnet_jax.classifier import (
    FeatureMoments,
    InvertibleClassifier,
    feature_moments,
    recalibrated,
)
from iresnet_jax.fixed_point import FixedPointInfo, fixed_point_inverse
from iresnet_jax.flows import Flow
from iresnet_jax.inverse_errors import (
    inverse_error_bound,
    inverse_error_in_double,
    latent_residual,
)
from iresnet_jax.layers import SpectralConv, SpectralDense
from iresnet_jax.logdet import (
    exact,
    log_det_bounds,
    series_along_probe,
    truncated_series,
    truncation_error_bound,
)
from iresnet_jax.models import ImageFlow, VectorFlow, num_parameters
from iresnet_jax.operators import (
    ConvOperator,
    DenseOperator,
    LinearOperator,
    adjoint,
    conv_operator,
    to_matrix,
)
from iresnet_jax.priors import DiagonalGaussian, bits_per_dim
from iresnet_jax.residual import BlockStack, ResidualBlock, Scale
from iresnet_jax.russian_roulette import russian_roulette
from iresnet_jax.spectral import (
    PowerIterationInfo,
    SingularVectors,
    init_singular_vectors,
    power_iteration,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
)
from iresnet_jax.transforms import (
    dequantize,
    injective_pad,
    injective_unpad,
    inverse_logit,
    logit,
    quantize,
    squeeze,
    unsqueeze,
)

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "ActNorm",
    "Activation",
    "Affine",
    "BlockStack",
    "Branch",
    "Certificate",
    "ConvOperator",
    "DenseOperator",
    "DiagonalGaussian",
    "FeatureMoments",
    "FixedPointInfo",
    "Flow",
    "ImageFlow",
    "InvertibleClassifier",
    "LinearOperator",
    "PowerIterationInfo",
    "ResidualBlock",
    "ResidualStack",
    "Scale",
    "Sequential",
    "SingularVectors",
    "SpectralConv",
    "SpectralDense",
    "VectorFlow",
    "adjoint",
    "bits_per_dim",
    "bottleneck_branch",
    "certify",
    "certify_flow",
    "conv_operator",
    "dense_branch",
    "dequantize",
    "exact",
    "feature_moments",
    "fixed_point_inverse",
    "gram_upper_bound",
    "init_singular_vectors",
    "injective_pad",
    "injective_unpad",
    "inverse_error_bound",
    "inverse_error_in_double",
    "inverse_logit",
    "latent_residual",
    "layer_upper_bound",
    "log_det_bounds",
    "logit",
    "num_parameters",
    "power_iteration",
    "power_iteration_to_tolerance",
    "quantize",
    "recalibrated",
    "russian_roulette",
    "series_along_probe",
    "sigma_estimate",
    "spectral_normalize",
    "squeeze",
    "to_matrix",
    "truncated_series",
    "truncation_error_bound",
    "unsqueeze",
]
