# %% [markdown]
# # 4 · Anatomy of a log-determinant
#
# At the end you will know where the error of an estimated log|det(I + J)| comes from, how much of
# it a certificate covers, what a probe costs and buys, and why the gradient needs no tape.
#
# We take one branch in 16 dimensions, so that the exact value is cheap and every estimate can be
# checked: g(x) = −φ(xW)Wᵀ, which contracts x about as strongly as its norms allow. Its Jacobian is
# symmetric with eigenvalues down to −L. No term of the series cancels another: the hardest case.

# %% tags=["hide-input"]
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import iresnet_jax as ir

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer draws
BLUE, ORANGE, GREEN, INK = "#2f6fb3", "#d9622b", "#3a8f5c", "#1f2933"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %%
DIM, WIDTH, COEFF = 16, 64, 0.9


def dense(kernel):
    """A layer scaled to a norm of COEFF: power iteration to its tolerance."""
    operator = ir.DenseOperator(kernel)
    vectors, _ = ir.power_iteration_to_tolerance(operator, ir.init_singular_vectors(operator))
    sigma = ir.sigma_estimate(operator, vectors)
    return ir.Affine(ir.spectral_normalize(operator, sigma, COEFF))


def symmetric(dim, width, activation):
    """x ↦ −φ(xW)Wᵀ."""
    kernel = jax.random.normal(jax.random.key(0), (dim, width))
    return ir.Sequential((dense(kernel), ir.Activation(activation), dense(-kernel.T)))


branch = symmetric(DIM, WIDTH, "elu")
x = jax.random.normal(jax.random.key(1), (1, DIM))
L = branch.lipschitz_bound()

_, log_det = ir.Exact()(branch, x)
jacobian = np.asarray(jax.jacfwd(lambda x: branch(x[None])[0])(x[0]), np.float64)
print(f"exact log|det(I + J)| = {float(log_det[0]):.4f} nats")
print(f"NumPy's slogdet       = {np.linalg.slogdet(np.eye(DIM) + jacobian)[1]:.4f}")
print(
    f"L = {L:.3f}, so by Lemma 2 it lies in",
    *[f"{float(b):.1f}" for b in ir.log_det_bounds(L, DIM)],
)

# %% [markdown]
# ## Bias: the series is truncated
#
# > log|det(I + J)| = tr J − tr J²/2 + tr J³/3 − …
#
# The remainder after n terms is at most d·Lⁿ⁺¹/((n+1)(1 − L)), a certified bound that does not need
# J. The actual bias falls faster, since the trace is a sum over *all* eigenvalues, and few of them
# are as large as L allows.

# %%
ns = np.arange(1, 31)
powers = [np.trace(np.linalg.matrix_power(jacobian, int(k))) for k in ns]
partial_sums = np.cumsum([(-1) ** (k + 1) / k * t for k, t in zip(ns, powers, strict=True)])
bias = np.abs(partial_sums - np.linalg.slogdet(np.eye(DIM) + jacobian)[1])
bound = [float(ir.truncation_error_bound(L, DIM, int(n))) for n in ns]
radius = np.abs(np.linalg.eigvals(jacobian)).max()

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
axes.semilogy(ns, bound, color=ORANGE, lw=2, label=f"certified, L = {L:.2f}")
axes.semilogy(ns, bias, "o-", color=BLUE, ms=4, label="this branch, this x")
decay = radius ** (ns + 1.0) / (ns + 1)
axes.semilogy(ns, bias[0] / decay[0] * decay, color=INK, ls=":", lw=1,
              label=f"ρⁿ⁺¹/(n+1), spectral radius ρ = {radius:.2f}")  # fmt: skip
axes.set(xlabel="terms n", ylabel="|bias| in nats", title="Bias against the number of terms")
axes.set_ylim(1e-6, 1e2)
_ = axes.legend(frameon=False)

# %% [markdown]
# ## Noise: traces are estimated
#
# In high dimension traces are estimated: tr A = E[vᵀAv] for any random v with E[vvᵀ] = I
# (Hutchinson). Random signs (*Rademacher*) have the smallest variance among independent entries:
# the diagonal of A adds nothing to it. For Gaussian entries, as in the paper's code, it does.
# Averaging m probes divides the standard deviation by √m.


# %%
def draws(probe, num_terms=10, count=100 if SMOKE else 4000):
    """Independent estimates with one probe each: the same x, many times in one batch."""
    estimator = jax.jit(ir.TruncatedSeries(num_terms, 1, probe))
    copies = jnp.repeat(x, 16 * count, axis=0)
    return np.asarray(estimator(branch, copies, jax.random.key(2))[1])


def averaged(estimates, num_probes):
    """What ``TruncatedSeries(…, num_probes)`` returns: means of so many probes."""
    return estimates.reshape(-1, num_probes).mean(axis=1)


probes = (1, 4, 16)
one_probe = {probe: draws(probe) for probe in ("rademacher", "gaussian")}
signs, gaussian = ({m: averaged(e, m) for m in probes} for e in one_probe.values())

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9.5, 3.6), width_ratios=(2, 1), layout="constrained"
)
edges = np.linspace(log_det[0] - 5, log_det[0] + 5, 81)
for m, colour in zip(probes, (ORANGE, BLUE, GREEN), strict=True):
    left.hist(
        signs[m], edges, density=True, color=colour, alpha=0.55, label=f"{m} probe" + "s" * (m > 1)
    )
left.axvline(log_det[0], color=INK, lw=1)
left.text(log_det[0], left.get_ylim()[1] * 0.97, " exact", va="top")
left.set(xlabel="estimate in nats", yticks=[], title="Ten terms, Rademacher probes")
left.legend(frameon=False)
for name, estimates, colour in (("Gaussian", gaussian, ORANGE), ("Rademacher", signs, BLUE)):
    spread = [estimates[m].std() for m in probes]
    right.loglog(probes, spread, "o", color=colour, label=name)
    right.loglog(probes, spread[0] / np.sqrt(probes), color=colour, lw=1, ls=":")
right.set(xlabel="probes m", title="Standard deviation, nats", xticks=probes, xticklabels=probes)
right.set_yticks((0.5, 1, 2), ("0.5", "1", "2"))
right.minorticks_off()
_ = right.legend(frameon=False)

# %% [markdown]
# Both errors together. More terms cost time in training but no memory (see below); more probes cost
# time only. For one image, the noise of one probe hides the bias as soon as that is smaller. Over a
# data set the noise averages out, **but the bias stays**. That is why the programs take as many
# terms as a certified bias needs before they quote a likelihood.

# %% tags=["hide-input"]
terms = (1, 5) if SMOKE else (1, 2, 3, 5, 8, 12, 20)
count, repeats = (20, 4) if SMOKE else (1000, 64)
data = jax.random.normal(jax.random.key(3), (count, DIM))
exact_values = np.asarray(ir.Exact()(branch, data)[1])
copies = jnp.repeat(data, repeats, axis=0)
noise, mean_error = [], []
for n in terms:
    estimates = jax.jit(ir.TruncatedSeries(n))(branch, copies, jax.random.key(4))[1]
    errors = np.asarray(estimates).reshape(count, repeats) - exact_values[:, None]
    noise.append(errors[:, 0].std())
    mean_error.append(abs(errors.mean()))
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
axes.semilogy(terms, noise, "o-", color=ORANGE, ms=4, label="noise of one sample, one probe")
axes.semilogy(terms, np.array(noise) / np.sqrt(count), "o--", color=ORANGE, ms=4, alpha=0.5,
              label=f"noise of the mean over {count:,}")  # fmt: skip
axes.semilogy(
    terms, mean_error, "o-", color=BLUE, ms=4, label=f"error of the mean, {repeats} probes"
)
axes.set(xlabel="terms n", ylabel="nats", title="What is left", xticks=terms, ylim=(1e-3, 5))
_ = axes.legend(frameon=False, loc="lower left")

# %% [markdown]
# ## The gradient needs no tape
#
# Backpropagation through the n products of the series takes memory that grows with n. The *Neumann
# gradient* (Chen et al. 2019) does not. With w = v − Jv + J²v − … held constant, the gradient is
# that of **vᵀJw**: one product. And w is a sum of the very vectors that the value needs.
#
# We compare the memory of both compiled gradients, on a wider branch.


# %%
def taped(num_terms):
    """The same series, differentiated through."""

    def estimate(branch, x, key):
        v = jax.random.rademacher(key, x.shape, x.dtype)
        out, jvp = jax.linearize(branch, x)
        power, total = v, 0.0
        for k in range(1, num_terms + 1):
            power = jvp(power)
            total = total + (-1) ** (k + 1) / k * jnp.sum(v * power, axis=1)
        return out, total

    return estimate


def temporary_memory(estimator):
    """MiB that a compiled gradient needs beside its inputs and outputs."""
    wide = symmetric(256, 256, "tanh")
    samples = jax.ShapeDtypeStruct((512, 256), jnp.float32)
    gradient = jax.grad(lambda branch, x: estimator(branch, x, jax.random.key(0))[1].sum())
    compiled = jax.jit(gradient).lower(wide, samples).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


lengths = (1, 2) if SMOKE else (1, 2, 5, 10, 15, 20)
neumann = [temporary_memory(ir.TruncatedSeries(n)) for n in lengths]
tape = [temporary_memory(taped(n)) for n in lengths]

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
axes.plot(lengths, tape, "o-", color=ORANGE, ms=4, label="through the series")
axes.plot(lengths, neumann, "o-", color=BLUE, ms=4, label="Neumann gradient")
axes.set(xlabel="terms n", ylabel="MiB", title="Memory of a gradient", xticks=lengths)
axes.set_ylim(bottom=0)
_ = axes.legend(frameon=False)

# %% [markdown]
# On average over probes it is the gradient of the series, so its error falls like Lⁿ too (Theorem 4
# of the paper). To see that without noise, take the 16 unit vectors as probes and sum: every trace
# is then exact.

# %%
copies = jnp.repeat(x, DIM, axis=0)


def kernel_gradient(log_det):
    """Gradient in the first kernel."""
    return np.asarray(jax.jit(jax.grad(log_det))(branch).stages[0].operator.kernel)


def series(num_terms):
    return lambda branch: ir.series_along_probe(branch, copies, jnp.eye(DIM), num_terms)[1].sum()


reference = kernel_gradient(lambda branch: ir.Exact()(branch, x)[1].sum())
orders = np.array((1, 2) if SMOKE else (1, 2, 3, 4, 6, 8, 10, 12, 16))
gaps = [np.linalg.norm(kernel_gradient(series(int(n))) - reference) for n in orders]
relative = np.array(gaps) / np.linalg.norm(reference)

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
axes.semilogy(orders, L**orders, color=ORANGE, lw=2, label=f"Lⁿ, L = {L:.2f}")
axes.semilogy(orders, relative, "o-", color=BLUE, ms=4, label="this branch, this x")
axes.set(xlabel="terms n", ylabel="relative error", title="Gradient against the number of terms")
_ = axes.legend(frameon=False)

# %% [markdown]
# Next: a branch of your own ([notebook 5](5_your_own_branch.py)).
