# %% [markdown]
# # 6 · Amortised inference
#
# At the end you will have learned the posterior of a simulator once, for every observation, held it
# against the exact posterior, and seen whether its credible regions cover what they claim.
#
# A simulator draws data x from parameters θ; what is wanted is p(θ | x). Simulating needs no
# likelihood, so learn the posterior from simulated pairs: `ir.fit(key, None, theta, condition=x)`
# maximises the mean of log q(θ | x), which is greatest where q is the posterior. Then a new x costs
# one evaluation. (Papamakarios & Murray 2016 began this; Cranmer et al. 2020 review it.)

# %% tags=["hide-input"]
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logsumexp
from scipy.stats import binom, norm

import iresnet_jax as ir

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer steps
PAIRS, EPOCHS, CHECKED, DRAWS = (300, 1, 20, 9) if SMOKE else (20_000, 30, 1_000, 99)
BLUE, ORANGE, INK = "#2f6fb3", "#d9622b", "#1f2933"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A simulator with a known posterior
#
# Two parameters with standard normal priors, and a measurement of each:
#
# - x₁ = θ₁ + ½ε is linear and Gaussian. Its posterior is a formula, N(0.8·x₁, 0.2).
# - x₂ = θ₂² + ½ε loses the sign of θ₂. Its posterior is p(θ₂ | x₂) ∝ N(θ₂; 0, 1)·N(x₂; θ₂², ¼),
#   with two modes where x₂ is large; one integral on the line normalises it.
#
# So the truth is at hand. The network is told nothing of it: it sees pairs.

# %%
NOISE = 0.5
LINE = np.linspace(-6.0, 6.0, 2401)


def simulate(rng, count):
    """Pairs (θ, x) of the prior and the simulator."""
    theta = rng.standard_normal((count, 2))
    mean = np.stack([theta[:, 0], theta[:, 1] ** 2], axis=1)
    return theta, mean + NOISE * rng.standard_normal((count, 2))


def log_posterior(theta, x):
    """The exact log p(θ | x), in nats, of pairs."""
    linear = norm.logpdf(theta[:, 0], 0.8 * x[:, 0], np.sqrt(0.2))
    joint = norm.logpdf(LINE) + norm.logpdf(x[:, 1:], LINE**2, NOISE)
    evidence = logsumexp(joint, axis=1) + np.log(LINE[1] - LINE[0])
    own = norm.logpdf(theta[:, 1]) + norm.logpdf(x[:, 1], theta[:, 1] ** 2, NOISE)
    return linear + own - evidence


rng = np.random.default_rng(0)
theta, x = simulate(rng, PAIRS)

# %% [markdown]
# ## One fit for every observation
#
# θ and x may be in any units; both are brought to one scale, and the scale is part of the flow. The
# certificate is proved once: the condition enters by shifts inside the branches, which no Lipschitz
# constant in θ depends on, so the flow is invertible at *every* x.

# %%
model = ir.nn.ConditionalVectorFlow(
    dim=2, depth=2 if SMOKE else 6, features=(32,), coeff=0.97, activation="sin", condition_dim=2
)
settings = {"batch_size": 256, "max_epochs": EPOCHS, "progress": False}
posterior, history = ir.fit(jax.random.key(0), model, theta, condition=x, **settings)
print("certified at every x:", posterior.certificate.certified)
print(f"fitted in {history.seconds:.0f} s, {history.epoch[-1]} epochs")

# %% [markdown]
# How far is it from the truth? The mean of log p(θ | x) − log q(θ | x) over fresh pairs is the
# Kullback–Leibler divergence of the two posteriors, averaged over observations.

# %%
fresh_theta, fresh_x = simulate(rng, 100 if SMOKE else 4_000)
log_prob = jax.jit(posterior.flow.log_prob)
apart = log_posterior(fresh_theta, fresh_x) - np.asarray(log_prob(fresh_theta, fresh_x))
print(f"divergence {apart.mean():.4f} ± {apart.std(ddof=1) / np.sqrt(len(apart)):.4f} nats")

# %% tags=["hide-input"]
observations = np.array([[-0.5, 0.0], [0.5, 1.0], [1.0, 3.0]], np.float32)
ticks = np.linspace(-3.0, 3.0, 121)
places = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
figure, panels = plt.subplots(1, 3, figsize=(10, 4.1), sharey=True, layout="constrained")
for axes, observed in zip(panels, observations, strict=True):
    repeated = np.broadcast_to(observed, places.shape)
    exact = np.exp(log_posterior(places, repeated)).reshape(121, 121)
    learned = np.exp(log_prob(places, observed)).reshape(121, 121)
    levels = exact.max() * np.array([0.05, 0.2, 0.5, 0.8])
    axes.contour(ticks, ticks, exact, levels, colors=INK, linewidths=1.0, linestyles=":")
    axes.contour(ticks, ticks, learned, levels, colors=BLUE, linewidths=1.4)
    axes.set(title=f"x = ({observed[0]:.1f}, {observed[1]:.1f})", xlabel="θ₁", aspect="equal")
panels[0].set_ylabel("θ₂")
lines = [plt.Line2D([], [], color=INK, ls=":"), plt.Line2D([], [], color=BLUE)]
_ = panels[0].legend(lines, ["exact", "learned"], frameon=False, loc="upper left")

# %% [markdown]
# ## Is it calibrated?
#
# Outside of an example the truth is not at hand. What remains is a test that needs simulations
# alone (Cook et al. 2006, Talts et al. 2018). Draw θ from the prior, x from the simulator, and L
# samples of q(θ | x). If q is the posterior, the true θ is one more draw of it, and its rank among
# the samples is uniform on 0, …, L. Too many ranks at both ends mean a posterior that is too
# narrow; too few, one that is too wide.
#
# Inverses that miss the solver's tolerance are counted, and their residual says by how much.

# %%
true_theta, seen_x = simulate(rng, CHECKED)
draw = jax.jit(lambda key, x: posterior.flow.sample(key, DRAWS, x))
samples, info = draw(jax.random.key(1), seen_x)
converged, left = info.converged.all(axis=0).mean(), info.residual.max()
print(
    f"samples {samples.shape}, {converged:.3%} of inverses converged; largest residual {left:.1g}"
)
ranks = (np.asarray(samples) < true_theta).sum(axis=0)

# %% tags=["hide-input"]
bins = 10 if SMOKE else 20
low, high = binom.ppf([0.005, 0.995], CHECKED, 1.0 / bins)
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for k, axes in enumerate(panels):
    axes.axhspan(low, high, color=INK, alpha=0.12, lw=0, label="99% of uniform counts")
    counts = np.histogram(ranks[:, k], bins, (0, DRAWS + 1))[0]
    axes.bar(np.arange(bins) + 0.5, counts, width=0.9, color=(BLUE, ORANGE)[k])
    axes.set(title=f"rank of θ{'₁₂'[k]}", xlabel="bin of ranks", xticks=[], ylim=(0, 1.5 * high))
    print(f"θ{'₁₂'[k]}: {np.sum((counts < low) | (counts > high))} of {bins} bins outside")
panels[0].set_ylabel("observations")
_ = panels[1].legend(frameon=False, loc="upper right")

# %% [markdown]
# Ranks look at one parameter at a time. *Expected coverage* (Hermans et al. 2022) looks at the
# whole: a region of the highest density that claims 80% should hold the true θ in 80% of the
# simulations. The mass of the smallest region that holds it is the share of samples with a higher
# density, which should be uniform.

# %%
densities = jax.jit(jax.vmap(posterior.flow.log_prob, (0, None)))(samples, jnp.asarray(seen_x))
at_truth = np.asarray(log_prob(true_theta, seen_x))
mass = (np.asarray(densities) > at_truth).mean(axis=0)
for level in (0.5, 0.8, 0.95):
    covered = (mass <= level).mean()
    error = np.sqrt(level * (1.0 - level) / CHECKED)
    print(f"regions of {level:.0%} hold the truth in {covered:.1%} (± {error:.1%} by chance)")

# %% tags=["hide-input"]
claimed = np.linspace(0.0, 1.0, 101)
band = binom.ppf([[0.005], [0.995]], CHECKED, claimed) / CHECKED
figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.fill_between(claimed, *band, color=INK, alpha=0.12, lw=0, label="99% if calibrated")
axes.plot(claimed, [(mass <= level).mean() for level in claimed], color=BLUE, lw=2, label="learned")
axes.set(xlabel="claimed coverage", ylabel="coverage", title="Expected coverage", aspect="equal")
_ = axes.legend(frameon=False, loc="upper left")

# %% [markdown]
# Here the curve runs a little below the diagonal, along the edge of the band: the regions are
# slightly too small. More simulations and a longer fit would bring them closer.
#
# A posterior can be calibrated on average and wrong at one x: calibration is necessary, not
# sufficient. Here the divergence above says how far it is; of a simulator of yours, fit twice, with
# more simulations the second time, and compare `history.final`.
#
# An image as x goes through an encoder of yours first: its embedding is the condition, and
# `ir.nn.value_and_grad` trains both (see [the guide](../FITTING.md)).
