# %% [markdown]
# # 2 · A density in the plane, step by step
#
# At the end you will have a trained density model of the plane, its samples, and a picture of how
# it bends space, built from pure functions alone: no Flax, no classes of your own, nothing hidden.
#
# Each step is one idea of the library: a linear operator and its norm, a branch, a block, a
# log-determinant, a flow.

# %% tags=["hide-input"]
import itertools
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import iresnet_jax as ir

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer steps
BLUE, ORANGE, INK = "#2f6fb3", "#d9622b", "#1f2933"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})


def moons(rng, n):
    """Two interleaved half circles with Gaussian noise, one after the other."""
    side, angle = np.repeat((-1.0, 1.0), n // 2)[:, None], rng.uniform(0, np.pi, n)
    arc = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1) - (1.0, 0.5)
    return jnp.asarray(side * arc + 0.2 * rng.standard_normal((n, 2)), jnp.float32)


# %% [markdown]
# ## A linear map and its norm
#
# A `DenseOperator` is x ↦ xW, as a pytree. Power iteration finds its norm: v ← Aᵀu/‖Aᵀu‖,
# u ← Av/‖Av‖, σ = uᵀAv. It approaches **from below**: until it has converged, σ is too small, and a
# layer divided by it is still too steep. The bound by `layer_upper_bound` is never too small.

# %%
operator = ir.DenseOperator(jax.random.normal(jax.random.key(0), (64, 64)) / 8)
vectors = ir.init_singular_vectors(operator)
one_step = jax.jit(lambda vectors: ir.power_iteration(operator, vectors, num_steps=1))
estimates = []
for _ in range(30):
    estimates.append(float(ir.sigma_estimate(operator, vectors)))
    vectors = one_step(vectors)
true_norm = np.linalg.norm(np.asarray(operator.kernel, np.float64), 2)
print(f"power iteration {estimates[0]:.4f} … {estimates[-1]:.4f}")
print(f"true norm       {true_norm:.4f}")
print(f"upper bound     {ir.layer_upper_bound(operator):.4f}")

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(estimates, "o-", color=ORANGE, ms=4, label="power iteration")
axes.axhline(true_norm, color=BLUE, lw=2, label="true norm and upper bound")
axes.set(xlabel="steps", ylabel="σ", title="A norm, approached from below")
_ = axes.legend(frameon=False, loc="lower right")

# %% [markdown]
# ## A branch with Lip(g) < 1
#
# Weights are raw arrays, and so are the singular vectors. These are *state*, passed in and out of
# the functions that need them. `spectral_normalize` scales a kernel by min(1, coeff/σ).
#
# `jax.vmap` makes all blocks at once, with their leaves stacked along a leading axis.

# %%
DEPTH, WIDTHS, COEFF = 3 if SMOKE else 12, (2, 64, 64, 2), 0.97


def init_block(key):
    """The raw parameters of one block."""
    shapes = list(itertools.pairwise(WIDTHS))
    keys = jax.random.split(key, len(shapes))
    return {
        "kernels": [jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(keys, shapes)],  # noqa: B905
        "biases": [jnp.zeros(s[1]) for s in shapes],
        "log_scale": jnp.zeros(2),
        "shift": jnp.zeros(2),
    }


def init_vectors(block):
    return [ir.init_singular_vectors(ir.DenseOperator(kernel)) for kernel in block["kernels"]]


def advance(block, vectors, num_steps=1):
    """Steps of every power iteration."""
    pairs = zip(block["kernels"], vectors, strict=True)
    return [ir.power_iteration(ir.DenseOperator(kernel), v, num_steps) for kernel, v in pairs]


def constrain(block, vectors):
    """The block as a pure function, every layer's norm at most COEFF."""
    stages = []
    for kernel, bias, v in zip(block["kernels"], block["biases"], vectors, strict=True):
        operator = ir.DenseOperator(kernel)
        sigma = ir.sigma_estimate(operator, v)
        layer = ir.Affine(ir.spectral_normalize(operator, sigma, COEFF), bias)
        stages += [ir.Activation("sin"), layer]
    norm = ir.ActNorm(block["log_scale"], block["shift"])
    return ir.Chain((norm, ir.Residual(ir.Sequential(tuple(stages[1:])))))


params = jax.vmap(init_block)(jax.random.split(jax.random.key(1), DEPTH))
state = jax.vmap(init_vectors)(params)
blocks = jax.vmap(constrain)(params, state)
print(jax.tree.map(jnp.shape, params["kernels"]))

# %% [markdown]
# ## Forward, log-determinant, inverse
#
# A block is y = h + g(h), where h is x after a learned scale and shift (ActNorm). Its
# log-determinant is a series of traces, each estimated along a random probe. In two dimensions the
# exact value is cheap, and lies within the spread of the estimates.

# %%
rng = np.random.default_rng(0)
x = moons(rng, 500)
first = jax.tree.map(lambda leaf: leaf[0], blocks)
y = first.forward(x)
back, info = first.inverse(y)
print("round trip, one block:", float(jnp.abs(back - x).max()), "steps", int(info.num_steps.max()))

_, exact = first.forward_and_log_det(x, ir.Exact())
keys = ir.block_keys(jax.random.key(2), first.num_branches, len(x))
_, series = first.forward_and_log_det(x, ir.TruncatedSeries(10), keys)
print("mean log|det|, exact :", float(exact.mean()))
print("ten terms, one probe :", float(series.mean()), "±", float(series.std() / np.sqrt(len(x))))

# %% [markdown]
# ## A flow, and its training
#
# A `Flow` is a row of blocks and a standard Gaussian. We train the raw parameters, while the
# singular vectors advance by one step at a time. `jax.value_and_grad` does the rest.

# %%
prior = ir.DiagonalGaussian(jnp.zeros(2), jnp.zeros(2))
NUM_STEPS = 10 if SMOKE else 3000
optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, NUM_STEPS))


def build(params, state):
    stack = ir.Stack(jax.vmap(constrain)(params, state), DEPTH)
    return ir.Flow((stack,), event_shape=(2,), priors=(prior,))


@jax.jit
def train_step(params, state, opt_state, batch):
    def loss(params, state):
        return -build(params, state).log_prob(batch, ir.Exact()).mean()

    state = jax.vmap(advance)(params, state)
    nats, gradient = jax.value_and_grad(loss)(params, state)
    change, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, change), state, opt_state, nats


opt_state, curve = optimizer.init(params), []
for _ in range(NUM_STEPS):
    params, state, opt_state, nats = train_step(params, state, opt_state, moons(rng, 256))
    curve.append(float(nats))

state = jax.vmap(partial(advance, num_steps=500))(params, state)  # the norms, converged
flow = build(params, state)
log_prob = jax.jit(lambda x: flow.log_prob(x, ir.Exact()))
held_out = -log_prob(moons(rng, 10_000))
print(f"held out: {held_out.mean():.3f} ± {held_out.std() / 100:.3f} nats")

# %% [markdown]
# Is it invertible? The bounds of `certify` are rigorous: of each branch as a whole, and at most the
# product of its layers' bounds. Power iteration, which estimates norms from below, is not in them.

# %%
certificate = ir.certify(flow)
print("certified:", certificate.certified, " largest L:", round(max(certificate.lipschitz), 4))
samples, info = jax.jit(lambda key: flow.sample(key, 10_000))(jax.random.key(3))
print("samples: all inverses converged:", bool(info.converged.all()))

# %% tags=["hide-input"]
axis = jnp.linspace(-4, 4, 200)
grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
density = jnp.exp(log_prob(grid)).reshape(200, 200)
figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
dots = {"s": 1.5, "lw": 0, "alpha": 0.6, "color": plt.colormaps["inferno"](0.8)}
panels[0].scatter(*moons(rng, 10_000).T, **dots)
panels[1].imshow(density, origin="lower", extent=(-4, 4, -4, 4), cmap="inferno")
panels[2].scatter(*samples.T, **dots)
for axes, title in zip(panels, ("data", "learned density", "samples"), strict=True):
    axes.set(title=title, xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[], aspect="equal")
    axes.set_facecolor(plt.colormaps["inferno"](0))

# %% [markdown]
# ## How space is bent
#
# The data as they pass through the blocks, on a grid that moves with the plane. It is stretched and
# bent, but never folded or torn: this is what invertibility looks like. Each picture is scaled to
# its data.

# %% tags=["hide-input"]
ticks, fine = jnp.linspace(-4, 4, 25), jnp.linspace(-4, 4, 200)
rows = [jnp.stack([fine, jnp.full_like(fine, t)], axis=1) for t in ticks]
lines = jnp.stack(rows + [row[:, ::-1] for row in rows])
points, mesh = moons(rng, 2_000), lines.reshape(-1, 2)
blocks = list(flow.blocks())
shown = [0, DEPTH // 3, 2 * DEPTH // 3, DEPTH]
figure, panels = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
for depth in range(DEPTH + 1):
    if depth in shown:
        axes = panels[shown.index(depth)]
        for line in mesh.reshape(lines.shape):
            axes.plot(*line.T, color=INK, lw=0.4, alpha=0.5)
        axes.scatter(*points.T, s=3, lw=0, c=[BLUE] * 1_000 + [ORANGE] * 1_000)
        axes.set(title=f"after {depth} blocks" if depth else "data", xticks=[], yticks=[])
        (x, y), size = points.mean(axis=0), 3.2 * points.std(axis=0).max()
        axes.set(xlim=(x - size, x + size), ylim=(y - size, y + size), aspect="equal")
    if depth < DEPTH:
        block = blocks[depth]
        points, mesh = block.forward(points), block.forward(mesh)

# %% [markdown]
# `ir.nn.VectorFlow` and `ir.nn.ImageFlow` wrap these functions in a Flax module that stores the
# parameters ([notebook 3](3_images.py)).
