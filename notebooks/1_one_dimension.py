# %% [markdown]
# # 1 · The idea in one dimension
#
# At the end you will have *seen* why x + g(x) can be inverted when g is less steep than 1, watched
# the iteration that inverts it, and turned the same map into a density whose paths never cross.
#
# On the line everything can be drawn, and the formulas hold in any dimension.

# %% tags=["hide-input"]
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import iresnet_jax as ir

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer steps
BLUE, ORANGE, INK = "#2f6fb3", "#d9622b", "#1f2933"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## When is y = x + g(x) invertible?
#
# The slope of x + g(x) is 1 + g′(x). If |g′| ≤ L < 1, it lies between 1 − L and 1 + L: the map
# climbs everywhere, so it reaches every height exactly once. If g is steeper than 1, the map may
# turn back and reach a height several times; then the x that it came from is lost.


# %%
def branch(steepness):
    """g with slopes of at most ``steepness``."""
    return lambda x: steepness * jnp.sin(1.7 * x + 0.6) / 1.7


gentle, steep = branch(0.8), branch(2.5)

# %% tags=["hide-input"]
x = jnp.linspace(-4, 4, 801)
figure, panels = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
for axes, g, colour, title in (
    (panels[0], gentle, BLUE, "L = 0.8: every height once"),
    (panels[1], steep, ORANGE, "L = 2.5: some heights three times"),
):
    y = x + g(x)
    axes.plot(x, y, color=colour, lw=2.2)
    height = 1.5
    hits = x[jnp.flatnonzero(jnp.diff(jnp.sign(y - height)))]
    axes.axhline(height, color=INK, lw=0.8, ls=":")
    for hit in hits:
        axes.plot([hit, hit], [-5, height], color=INK, lw=0.8, ls=":")
    axes.plot(hits, jnp.full(hits.shape, height), "o", color=INK, ms=5)
    axes.set(title=title, xlabel="x", ylim=(-5, 5), xlim=(-4, 4), aspect="equal")
at_zero = gentle(0.0)  # from any of its points, the curve stays in such a cone
panels[0].fill_between(x, at_zero + 0.2 * x, at_zero + 1.8 * x, color=BLUE, alpha=0.1, lw=0)
panels[0].text(-3.7, 3.4, "slopes from\n1 − L to 1 + L", color=BLUE, fontsize=9)
_ = panels[0].set_ylabel("y = x + g(x)")

# %% [markdown]
# ## The inverse
#
# We want the x with x = y − g(x). Start anywhere and iterate **x ← y − g(x)**. Each step brings two
# starting points closer by the factor L, since |g(a) − g(b)| ≤ L·|a − b|, and so it does the
# iterate and the solution. That is Banach's theorem, and the whole inverse of an invertible
# residual network.
#
# The plots show the walk to the crossing of two curves, and its distance to the solution beside
# Banach's bound.

# %%
y, start = 0.1, -2.0
walk = [start]
for _ in range(100):
    walk.append(float(y - gentle(walk[-1])))
print("x =", walk[-1], "  x + g(x) =", walk[-1] + float(gentle(walk[-1])))

# %% tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
t = jnp.linspace(-2.2, 1.0, 200)
left.plot(t, y - gentle(t), color=BLUE, lw=2.2, label="y − g(x)")
left.plot(t, t, color=INK, lw=1.0, label="x")
corners = np.repeat(walk[:16], 2)
left.plot(corners[:-1], corners[1:], color=ORANGE, lw=1.2)
left.plot(start, start, "o", color=ORANGE, ms=6)
left.annotate("start", (start, start), (8, -4), textcoords="offset points", color=ORANGE)
left.set(xlabel="x", title="The walk x ← y − g(x)", xlim=(-2.2, 1.0), ylim=(-2.2, 1.0))
left.set_aspect("equal")
left.legend(frameon=False, loc="lower right")
error = np.abs(np.array(walk[:36]) - walk[-1])
right.semilogy(error, "o-", color=ORANGE, ms=4, label="distance to the solution")
right.semilogy(error[0] * 0.8 ** np.arange(36), color=INK, ls="--", label="Banach: Lᵏ, L = 0.8")
right.set(xlabel="steps k", title="Never slower than promised", ylim=(1e-6, 5))
_ = right.legend(frameon=False)

# %% [markdown]
# `ir.fixed_point_inverse` is that loop, and more. It reports how each sample went. Given L and a
# bound on the rounding of g, it bounds its own error by (residual + rounding)/(1 − L). And it is
# differentiable without backpropagation through the steps: the slope of the inverse is 1/(1 +
# g′(x)).

# %%
points = jnp.array([[-2.0], [0.5], [1.9]])
x_found, info = ir.fixed_point_inverse(
    gentle,
    points,
    lipschitz=0.8,
    rounding=lambda x: jnp.full(len(x), 1e-6),  # of this g, in float32, for |x| ≤ 4
)
print("round trip      :", jnp.abs(x_found + gentle(x_found) - points).max())
print("certified error :", info.error_bound)
slope = jax.grad(lambda y: ir.fixed_point_inverse(gentle, y)[0].sum())(points)
print("slope of inverse:", slope.ravel())
print("1/(1 + g′(x))   :", 1 / (1 + jax.vmap(jax.grad(gentle))(x_found.ravel())))

# %% [markdown]
# ## From a map to a density
#
# Let z = F(x) be such a map, and let z follow a bell curve N. Then x has the density
#
# > log p(x) = log N(F(x)) + log F′(x)
#
# and each block adds log(1 + g′), which for |g′| < 1 is the series g′ − g′²/2 + g′³/3 − …. In many
# dimensions, powers of the Jacobian replace powers of g′ ([notebook 4](4_log_determinants.py)).
#
# We fit ten blocks to a density with three peaks, by maximum likelihood. `VectorFlow` keeps the
# norm of every layer below `coeff`. The power iterations that estimate these norms advance by one
# step in every training step: `model.advance`.

# %%
WEIGHTS, CENTRES, WIDTHS = np.array([0.4, 0.25, 0.35]), np.array([-1.2, 0.0, 1.3]), 0.2


def true_density(x):
    bells = np.exp(-0.5 * ((x[:, None] - CENTRES) / WIDTHS) ** 2)
    return bells @ WEIGHTS / (WIDTHS * np.sqrt(2 * np.pi))


rng = np.random.default_rng(0)
data = rng.choice(CENTRES, p=WEIGHTS, size=20_000) + WIDTHS * rng.standard_normal(20_000)
data = jnp.asarray(data[:, None], jnp.float32)

model = ir.nn.VectorFlow(
    dim=1, depth=1 if SMOKE else 10, features=(32, 32), coeff=0.97, activation="sin"
)
variables = jax.jit(model.init)(jax.random.key(0), data)
optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 10 if SMOKE else 1500))


@jax.jit
def train_step(variables, opt_state, batch):
    def loss(params):
        flow, state = model.advance({**variables, "params": params})
        return -flow.log_prob(batch, ir.Exact()).mean(), state

    (nats, state), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    change, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(variables["params"], change)
    return {"params": params, **state}, opt_state, nats


opt_state = optimizer.init(variables["params"])
for _ in range(10 if SMOKE else 1500):
    batch = data[rng.integers(len(data), size=256)]
    variables, opt_state, nats = train_step(variables, opt_state, batch)

flow = model.flow(ir.nn.converge(model, variables))
log_prob = jax.jit(lambda x: flow.log_prob(x, ir.Exact()))
nats = -log_prob(data).mean()
print(f"model: {nats:.3f} nats,  true density: {-np.log(true_density(np.ravel(data))).mean():.3f}")
print("certified:", ir.certify(flow).certified)

# %% [markdown]
# Every line below is one point on its way through the ten blocks, from the data on the left to the
# bell curve on the right. The mass between two neighbours is a sixtieth everywhere: where paths are
# dense, so are the data. **No two paths cross.** Data whose paths met would share a latent, and
# could not be told apart afterwards.

# %%
path = [jnp.quantile(data, jnp.linspace(0.002, 0.998, 60))[:, None]]  # equal mass between paths
for block in flow.blocks():
    path.append(block.forward(path[-1]))
path = np.stack(path)[:, :, 0]
print("pairs of neighbours that change their order:", int((np.diff(path, axis=1) <= 0).sum()))

# %% tags=["hide-input"]
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(10, 4.2), width_ratios=(1, 4, 1), layout="constrained"
)
grid = np.linspace(-2.8, 2.8, 400)
density = np.exp(log_prob(jnp.asarray(grid[:, None], jnp.float32)))
left.hist(np.ravel(data), bins=90, range=(-2.8, 2.8), density=True, orientation="horizontal",
          color=BLUE, alpha=0.25)  # fmt: skip
left.plot(true_density(grid), grid, color=INK, lw=1, ls=":", label="true")
left.plot(density, grid, color=BLUE, lw=2, label="model")
left.invert_xaxis()
left.set(title="data", ylabel="x", ylim=(-2.8, 2.8), xticks=[])
left.legend(frameon=False, fontsize=8, loc="upper left")
colours = plt.colormaps["viridis"](np.linspace(0, 0.92, path.shape[1]))
for line, colour in zip(path.T, colours, strict=True):
    middle.plot(line, color=colour, lw=1.1)
middle.set(title="through the blocks", xlabel="block", xlim=(0, len(path) - 1), ylim=(-2.8, 2.8))
z = np.linspace(-2.8, 2.8, 400)
right.plot(np.exp(flow.prior_log_prob((jnp.asarray(z[:, None]),))), z, color=ORANGE, lw=2)
_ = right.set(title="latents", ylim=(-2.8, 2.8), xticks=[], yticks=[])

# %% [markdown]
# Read from right to left, the same picture generates data: draw z from the bell curve, and follow
# the lines back by the iteration above. `flow.sample` does that, and reports on every inverse.
# (Where the slope of g is close to −1 it takes many steps; the default limit is 100 per block.)

# %%
solver = ir.FixedPointIteration(atol=1e-5, max_steps=400)
draw = jax.jit(lambda key: flow.sample(key, 20_000, solver=solver))
samples, info = draw(jax.random.key(1))
print("all converged:", bool(info.converged.all()), " most steps:", int(info.num_steps.max()))

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(np.ravel(samples), bins=90, range=(-2.8, 2.8), density=True, color=ORANGE, alpha=0.35,
          label="samples")  # fmt: skip
axes.plot(grid, density, color=BLUE, lw=2, label="model")
axes.plot(grid, true_density(grid), color=INK, lw=1, ls=":", label="true density")
axes.set(xlabel="x", yticks=[], title="Samples follow the density that was learned")
_ = axes.legend(frameon=False)

# %% [markdown]
# Next: the same in the plane, with every part built by hand ([notebook 2](2_density.py)).
