"""Flax modules that store the weights of invertible networks.

What computes has its name in :mod:`iresnet_jax`; what stores has it here: ``nn.Stack`` hands out an
``iresnet_jax.Stack`` by ``pure``, ``nn.Sequential`` an ``iresnet_jax.Sequential``.
"""

from iresnet_jax.frozen_vectors import frozen_vectors
from iresnet_jax.nn.activations import CLipSwish, GroupSort, LipSwish, ScaledActivation
from iresnet_jax.nn.branches import Sequential, bottleneck_branch, dense_branch
from iresnet_jax.nn.classifier import (
    FeatureMoments,
    InvertibleClassifier,
    feature_moments,
    recalibrated,
)
from iresnet_jax.nn.concatenation import DenseConcatenation, concatenation_branch
from iresnet_jax.nn.conditional import ConditionalShift, ConditionalVectorFlow
from iresnet_jax.nn.dequantizer import VariationalDequantization
from iresnet_jax.nn.gradients import value_and_grad
from iresnet_jax.nn.layers import SpectralConv, SpectralDense
from iresnet_jax.nn.models import (
    BranchFactory,
    FlowModel,
    ImageFlow,
    ImageNetwork,
    VectorFlow,
    num_parameters,
)
from iresnet_jax.nn.monlip import MonLip, monlip_branch, shallow_monlip_branch
from iresnet_jax.nn.monotone import Monotone
from iresnet_jax.nn.orthonormal import OrthonormalDense
from iresnet_jax.nn.stack import Stack
from iresnet_jax.nn.variables import converge, shrink

__all__ = [
    "BranchFactory",
    "CLipSwish",
    "ConditionalShift",
    "ConditionalVectorFlow",
    "DenseConcatenation",
    "FeatureMoments",
    "FlowModel",
    "GroupSort",
    "ImageFlow",
    "ImageNetwork",
    "InvertibleClassifier",
    "LipSwish",
    "MonLip",
    "Monotone",
    "OrthonormalDense",
    "ScaledActivation",
    "Sequential",
    "SpectralConv",
    "SpectralDense",
    "Stack",
    "VariationalDequantization",
    "VectorFlow",
    "bottleneck_branch",
    "concatenation_branch",
    "converge",
    "dense_branch",
    "feature_moments",
    "frozen_vectors",
    "monlip_branch",
    "num_parameters",
    "recalibrated",
    "shallow_monlip_branch",
    "shrink",
    "value_and_grad",
]
