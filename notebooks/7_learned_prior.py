# %% [markdown]
# # 7 · A learned prior in NumPyro
#
# At the end you will have fitted a prior to earlier data, put it into a Bayesian model of NumPyro,
# sampled its posterior by NUTS, and compared it with the exact one and with a Gaussian prior.
#
# A flow is a `Distribution`: `FlowDistribution(flow)` stands wherever NumPyro takes one. Its log
# density is exact, smooth, and defined on all of ℝᵈ, which is what Hamiltonian samplers need.

# %% tags=["hide-input"]
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS
from scipy.special import logsumexp
from scipy.stats import norm

import iresnet_jax as ir
from iresnet_jax.interop.numpyro import FlowDistribution

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer steps
ROWS, EPOCHS, WARMUP, DRAWS = (300, 1, 5, 10) if SMOKE else (5_000, 60, 500, 1_000)
BLUE, ORANGE, INK = "#2f6fb3", "#d9622b", "#1f2933"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Earlier data, and a prior of them
#
# Of 5,000 earlier units two parameters are known. They lie on a crescent: radius N(2, 0.2²), angle
# N(0, 0.8²). We know its density, so that there is a truth to compare with; the flow sees points.


# %%
def crescent(rng, count):
    """Parameters of units: points on a crescent."""
    radius = 2.0 + 0.2 * rng.standard_normal(count)
    angle = 0.8 * rng.standard_normal(count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def log_crescent(theta):
    """Their exact log density in nats, by the change of variables; the angle's tails wrap once."""
    radius, angle = np.hypot(*theta.T), np.arctan2(*theta.T[::-1])
    turns = angle[..., None] + 2.0 * np.pi * np.arange(-1, 2)
    angular = logsumexp(norm.logpdf(turns, 0.0, 0.8), axis=-1)
    return norm.logpdf(radius, 2.0, 0.2) + angular - np.log(radius)


rng = np.random.default_rng(0)
earlier = crescent(rng, ROWS)
model = ir.nn.VectorFlow(
    dim=2, depth=2 if SMOKE else 8, features=(32,), coeff=0.97, activation="sin"
)
settings = {"batch_size": 256, "max_epochs": EPOCHS, "progress": False}
fitted, history = ir.fit(jax.random.key(0), model, earlier, **settings)
fresh = crescent(rng, 5_000)
apart = log_crescent(fresh) - np.asarray(fitted.log_prob(fresh))
print("certified:", fitted.certificate.certified)
print(f"divergence {apart.mean():.3f} ± {apart.std(ddof=1) / np.sqrt(len(apart)):.3f} nats")

# %% [markdown]
# ## A new unit
#
# Of a new unit only the second parameter is measured, y = θ₂ + 0.3ε. What it tells of the first is
# in the prior alone. The model is two lines; the second prior has the mean and covariance of the
# same data.

# %%
SIGMA, OBSERVED = 0.3, 0.3
gaussian = dist.MultivariateNormal(
    jnp.asarray(earlier.mean(axis=0), float), jnp.asarray(np.cov(earlier.T), float)
)


def unit(prior, y):
    theta = numpyro.sample("theta", prior)
    numpyro.sample("y", dist.Normal(theta[1], SIGMA), obs=y)


draws = {}
for name, prior in (("flow", FlowDistribution(fitted.flow)), ("Gaussian", gaussian)):
    mcmc = MCMC(
        NUTS(unit),
        num_warmup=WARMUP,
        num_samples=DRAWS,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), prior, OBSERVED)
    draws[name] = np.asarray(mcmc.get_samples(group_by_chain=True)["theta"], np.float64)

# %% [markdown]
# The exact posterior, by quadrature on a grid, of the true prior; and of the learned one, which
# tells what is the sampler's error and what is the fit's.

# %%
axis = np.linspace(-5.0, 5.0, 200)  # without 0, where a radius has no logarithm
grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
likelihood = norm.logpdf(OBSERVED, grid[:, 1], SIGMA)


def by_quadrature(log_prior):
    """Weights of the posterior on the grid."""
    log_weights = log_prior + likelihood
    return np.exp(log_weights - logsumexp(log_weights))


learned_prior = np.asarray(jax.jit(fitted.flow.log_prob)(jnp.asarray(grid, jnp.float32)), float)
exact, learned = by_quadrature(log_crescent(grid)), by_quadrature(learned_prior)
print(f"mean of θ₁, exact             {exact @ grid[:, 0]:.3f}")
print(f"of the flow's prior           {learned @ grid[:, 0]:.3f}, by quadrature")
for name, chains in draws.items():
    first = chains[..., 0]
    size = float(effective_sample_size(first))
    print(
        f"NUTS, {name:8} prior          {first.mean():.3f} ± {first.std() / np.sqrt(size):.3f}, "
        f"R̂ {float(split_gelman_rubin(first)):.3f}, {size:.0f} effective draws of {first.size}"
    )

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 3, figsize=(10, 4.1), sharey=True, layout="constrained")
panels[0].scatter(*earlier.T, s=1.5, lw=0, color=INK, alpha=0.5)
panels[0].axhspan(OBSERVED - SIGMA, OBSERVED + SIGMA, color=ORANGE, alpha=0.25, lw=0)
panels[0].set(title="earlier units, and y ± 0.3", ylabel="θ₂")
density = exact.reshape(200, 200)
for axes, (name, chains), colour in zip(panels[1:], draws.items(), (BLUE, ORANGE), strict=True):
    axes.scatter(*chains.reshape(-1, 2).T, s=1.5, lw=0, color=colour, alpha=0.6)
    levels = density.max() * np.array([0.05, 0.3, 0.7])
    axes.contour(axis, axis, density, levels, colors=INK, linewidths=0.9)
    axes.set(title=f"{name} prior; lines: exact")
for axes in panels:
    axes.set(xlabel="θ₁", xlim=(-2.5, 3.5), ylim=(-3, 3), aspect="equal")

# %% [markdown]
# ## What the prior is worth
#
# Over many new units: the mean log posterior density at the true parameters, beside that of the
# exact posterior. The difference is the information that is lost, in nats a unit, with its standard
# error. A Gaussian's is a formula, the flow's is an integral on the grid.

# %%
units = crescent(rng, 10 if SMOKE else 400)
seen = units[:, 1] + SIGMA * rng.standard_normal(len(units))
log_likelihood = norm.logpdf(seen[:, None], grid[:, 1], SIGMA)
log_cell = 2.0 * np.log(axis[1] - axis[0])
gaussian_prior = np.asarray(gaussian.log_prob(jnp.asarray(grid, float)), float)


def log_scores(on_grid, at_truth):
    """Log posterior densities of the units' true parameters under a prior."""
    evidence = logsumexp(on_grid + log_likelihood, axis=1) + log_cell
    return at_truth + norm.logpdf(seen, units[:, 1], SIGMA) - evidence


best = log_scores(log_crescent(grid), log_crescent(units))
for name, on_grid, at_truth in (
    ("flow", learned_prior, np.asarray(fitted.log_prob(units), float)),
    ("Gaussian", gaussian_prior, np.asarray(gaussian.log_prob(jnp.asarray(units, float)), float)),
):
    lost = best - log_scores(on_grid, at_truth)
    error = lost.std(ddof=1) / np.sqrt(len(lost))
    print(f"{name:8} prior loses {lost.mean():.3f} ± {error:.3f} nats a unit")

# %% [markdown]
# NUTS evaluates the flow forwards alone, so nothing is inverted while it runs. The same
# distribution is a guide of variational inference, where sampling inverts it
# ([the guide](../INTEROP.md)).
