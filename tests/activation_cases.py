"""Activations in extended precision, from their definitions."""

import numpy as np


def reference(name, x):
    """The activation in extended precision, from its definition."""
    x = x.astype(np.longdouble)
    near = x - 2 * np.round(x / 2)
    near = np.where(np.abs(near) > 0.5, np.sign(near) - near, near)
    pi = np.longdouble("3.14159265358979323846264338327950288")
    return {
        "elu": lambda: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        "relu": lambda: np.maximum(x, 0),
        "leaky_relu": lambda: np.where(x >= 0, x, x / 100),
        "softplus": lambda: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
        "tanh": lambda: np.tanh(x),
        "sin": lambda: np.sin(pi * near) / pi,
        "lipswish": lambda: x / (1 + np.exp(-x)) * 10 / 11,
    }[name]()
