"""Invertible residual networks in JAX.

What computes is here: pure functions and pytrees, from operator norms
(:mod:`~iresnet_jax.spectral`, :mod:`~iresnet_jax.bounds`) to whole networks
(:mod:`~iresnet_jax.flows`). What stores weights is in :mod:`iresnet_jax.nn`: Flax modules.
"""

from iresnet_jax import nn, rounding
from iresnet_jax.activations import ACTIVATIONS, register_activation
from iresnet_jax.actnorm import ActNorm
from iresnet_jax.asinh import Asinh
from iresnet_jax.bijections import Bijection, BranchBounds, Chain, Error
from iresnet_jax.bounds import gram_upper_bound, layer_upper_bound
from iresnet_jax.certificates import (
    BlockCertificate,
    BranchCertificate,
    Certificate,
    LayerCertificate,
    certify_branch,
)
from iresnet_jax.certification import certify
from iresnet_jax.concatenation import DenseConcatenation, bounded_weights
from iresnet_jax.conditional import ConditionalFlow, ConditionalShift, ContextNetwork
from iresnet_jax.convergence import FixedPointInfo, UnconvergedError, UnconvergedWarning
from iresnet_jax.dequantization import dequantize, quantize
from iresnet_jax.fitted import Dequantizer, Fitted, FittedConditional, History
from iresnet_jax.fitting import fit
from iresnet_jax.fixed_point import fixed_point_inverse
from iresnet_jax.flows import Flow, Latents
from iresnet_jax.group_sort import GroupSort
from iresnet_jax.inverse_errors import (
    inverse_error_bound,
    inverse_error_in_double,
    latent_residual,
)
from iresnet_jax.layer_walk import layers_by_path, with_layer_bounds
from iresnet_jax.logdet import Estimator, Exact, log_det_bounds
from iresnet_jax.mixing import Invertible1x1, inverse_upper_bound
from iresnet_jax.model_files import shipped_models
from iresnet_jax.monlip import MonLip
from iresnet_jax.monotone import Monotone
from iresnet_jax.operators import (
    ConvOperator,
    DenseOperator,
    LinearOperator,
    adjoint,
    conv_operator,
    to_matrix,
)
from iresnet_jax.orthonormal import orthonormalized
from iresnet_jax.priors import DiagonalGaussian, bits_per_dim
from iresnet_jax.probes import block_keys
from iresnet_jax.residual import Residual, bounded_branch, solve_error
from iresnet_jax.rounding import Arithmetic
from iresnet_jax.russian_roulette import Roulette
from iresnet_jax.saving import load, save
from iresnet_jax.scaled_activation import ScaledActivation
from iresnet_jax.series import (
    BoundedSeries,
    TruncatedSeries,
    series_along_probe,
    truncation_error_bound,
)
from iresnet_jax.solvers import Anderson, FixedPointIteration, Solver
from iresnet_jax.spectral import (
    PowerIterationInfo,
    SingularVectors,
    init_singular_vectors,
    power_iteration,
    power_iteration_to_tolerance,
    sigma_estimate,
    spectral_normalize,
)
from iresnet_jax.stack import Stack
from iresnet_jax.stages import (
    Activation,
    Affine,
    ModuleStage,
    Sequential,
)
from iresnet_jax.statements import stated_lipschitz, stated_rounding, stated_slopes
from iresnet_jax.swish import CLipSwish, LipSwish
from iresnet_jax.transforms import (
    Center,
    Logit,
    Pad,
    Squeeze,
    Transform,
    injective_pad,
    injective_unpad,
    inverse_logit,
    logit,
    squeeze,
    unsqueeze,
)
from iresnet_jax.types import Branch

__version__ = "0.1.0"

__all__ = [
    "ACTIVATIONS",
    "ActNorm",
    "Activation",
    "Affine",
    "Anderson",
    "Arithmetic",
    "Asinh",
    "Bijection",
    "BlockCertificate",
    "BoundedSeries",
    "Branch",
    "BranchBounds",
    "BranchCertificate",
    "CLipSwish",
    "Center",
    "Certificate",
    "Chain",
    "ConditionalFlow",
    "ConditionalShift",
    "ContextNetwork",
    "ConvOperator",
    "DenseConcatenation",
    "DenseOperator",
    "Dequantizer",
    "DiagonalGaussian",
    "Error",
    "Estimator",
    "Exact",
    "Fitted",
    "FittedConditional",
    "FixedPointInfo",
    "FixedPointIteration",
    "Flow",
    "GroupSort",
    "History",
    "Invertible1x1",
    "Latents",
    "LayerCertificate",
    "LinearOperator",
    "LipSwish",
    "Logit",
    "ModuleStage",
    "MonLip",
    "Monotone",
    "Pad",
    "PowerIterationInfo",
    "Residual",
    "Roulette",
    "ScaledActivation",
    "Sequential",
    "SingularVectors",
    "Solver",
    "Squeeze",
    "Stack",
    "Transform",
    "TruncatedSeries",
    "UnconvergedError",
    "UnconvergedWarning",
    "adjoint",
    "bits_per_dim",
    "block_keys",
    "bounded_branch",
    "bounded_weights",
    "certify",
    "certify_branch",
    "conv_operator",
    "dequantize",
    "fit",
    "fixed_point_inverse",
    "gram_upper_bound",
    "init_singular_vectors",
    "injective_pad",
    "injective_unpad",
    "inverse_error_bound",
    "inverse_error_in_double",
    "inverse_logit",
    "inverse_upper_bound",
    "latent_residual",
    "layer_upper_bound",
    "layers_by_path",
    "load",
    "log_det_bounds",
    "logit",
    "nn",
    "orthonormalized",
    "power_iteration",
    "power_iteration_to_tolerance",
    "quantize",
    "register_activation",
    "rounding",
    "save",
    "series_along_probe",
    "shipped_models",
    "sigma_estimate",
    "solve_error",
    "spectral_normalize",
    "squeeze",
    "stated_lipschitz",
    "stated_rounding",
    "stated_slopes",
    "to_matrix",
    "truncation_error_bound",
    "unsqueeze",
    "with_layer_bounds",
]
