# %% [markdown]
# # 5 · Your own branch in 20 lines
#
# At the end you will have written a residual branch of your own, trained a flow with it, and
# certified it; and you will have seen one that cannot be certified.
#
# What can be proved depends on the stages of the branch:
#
# | stage of a branch | its Lipschitz bound |
# | --- | --- |
# | `SpectralDense`, `SpectralConv` | computed by the library, rigorously |
# | an activation by name (`"elu"`, `"sin"`, …) | known |
# | any Flax module with `lipschitz_bound(variables)` | what it states |
# | any other Flax module | none: *not certified*, and the module is named |

# %% tags=["hide-input"]
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import iresnet_jax as ir

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer steps
DEPTH, NUM_STEPS = (1, 5) if SMOKE else (8, 2000)
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})


def pinwheel(rng, n):
    """Five Gaussian blades, sheared by an angle that grows with the radius."""
    radius, across = 2 + 0.6 * rng.standard_normal(n), 0.2 * rng.standard_normal(n)
    angle = rng.integers(5, size=n) * (2 * np.pi / 5) + 0.25 * np.exp(radius / 2)
    point = (radius + 1j * across) * np.exp(1j * angle)
    return jnp.asarray(np.stack([point.real, point.imag], axis=1), jnp.float32)


# %% [markdown]
# ## Twenty lines
#
# Here are two modules that the library does not know. `Swish` is x·sigmoid(βx)/1.1 with a learned
# β, the activation of Residual Flows. Its slope stays below 1 for every β > 0, so it may state 1.
# `Rotation` rotates pairs of features by learned angles: norm 1, without power iteration. That
# holds in exact arithmetic; the module states the norm of the cosines and sines *as computed*.


# %%
class Swish(nn.Module):
    @nn.compact
    def __call__(self, x):
        beta = jax.nn.softplus(self.param("beta", nn.initializers.constant(0.5), ()))
        return x * jax.nn.sigmoid(beta * x) / 1.1

    def lipschitz_bound(self, variables):
        return 1.0


class Rotation(nn.Module):
    @nn.compact
    def __call__(self, x):
        angle = self.param("angle", nn.initializers.normal(1.0), (x.shape[-1] // 2,))
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def lipschitz_bound(self, variables):
        angle = variables["params"]["angle"]
        cos, sin = (np.asarray(f(angle), np.float64) for f in (jnp.cos, jnp.sin))
        return np.hypot(cos, sin).max() * (1 + 1e-12)


def my_branch(dim, features, *, coeff, **options):
    wide = ir.nn.SpectralDense(features[0], coeff)
    return ir.nn.Sequential((wide, Swish(), Rotation(), Swish(), ir.nn.SpectralDense(dim, coeff)))


# %% [markdown]
# A function makes the branch. The model calls it with the number of channels, the widths inside,
# and its settings (`coeff`, `activation`, …), to use or to ignore. `ImageFlow` and
# `InvertibleClassifier` take such a function too.

# %%
rng = np.random.default_rng(0)
model = ir.nn.VectorFlow(dim=2, depth=DEPTH, features=(64,), coeff=0.97, make_branch=my_branch)
variables = jax.jit(model.init)(jax.random.key(0), pinwheel(rng, 1000))
certificate = ir.certify(model, variables)
print("certified:", certificate.certified)
for stage in next(model.flow(variables).blocks()).links[-1].branch.stages:
    name = type(getattr(stage, "module", stage)).__name__
    print(f"  {name:10s} bound {stage.lipschitz_bound():.9f}")

# %% [markdown]
# ## Train it
#
# Training is the same as before: the parameters of your modules are trained with the rest, while
# the power iterations of the library's layers advance.


# %%
def train(model, num_steps=NUM_STEPS):
    variables = jax.jit(model.init)(jax.random.key(0), pinwheel(rng, 1000))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))

    @jax.jit
    def step(variables, opt_state, batch):
        def loss(params):
            flow, state = model.advance({**variables, "params": params})
            return -flow.log_prob(batch, ir.Exact()).mean(), state

        (nats, state), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(variables["params"], change)
        return {"params": params, **state}, opt_state, nats

    opt_state = optimizer.init(variables["params"])
    for _ in range(num_steps):
        variables, opt_state, nats = step(variables, opt_state, pinwheel(rng, 256))
    print(f"last batch: {nats:.3f} nats")
    return ir.nn.converge(model, variables)


variables = train(model)
flow = model.flow(variables)
certificate = ir.certify(model, variables)
print("certified:", certificate.certified, " largest L:", round(max(certificate.lipschitz), 4))
swishes = [block.links[-1].branch.stages[1] for block in flow.blocks()]
betas = [jax.nn.softplus(swish.variables["params"]["beta"]) for swish in swishes]
print("learned β:", np.round(betas, 2))
samples, info = jax.jit(lambda key: flow.sample(key, 10_000))(jax.random.key(1))
print("all inverses converged:", bool(info.converged.all()))

# %% tags=["hide-input"]
axis = jnp.linspace(-4, 4, 200)
grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
density = jnp.exp(jax.jit(lambda x: flow.log_prob(x, ir.Exact()))(grid)).reshape(200, 200)
figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
dots = {"s": 1.5, "lw": 0, "alpha": 0.6, "color": plt.colormaps["inferno"](0.8)}
panels[0].scatter(*pinwheel(rng, 10_000).T, **dots)
panels[1].imshow(density, origin="lower", extent=(-4, 4, -4, 4), cmap="inferno")
panels[2].scatter(*samples.T, **dots)
for axes, title in zip(panels, ("data", "learned density", "samples"), strict=True):
    axes.set(title=title, xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[], aspect="equal")
    axes.set_facecolor(plt.colormaps["inferno"](0))

# %% [markdown]
# ## What cannot be certified
#
# Now the same branch, with Flax's own `Dense` at the end: nothing bounds or constrains it. It
# trains as well, if not better. But ask for the certificate:


# %%
def careless_branch(dim, features, *, coeff, **options):
    return ir.nn.Sequential((ir.nn.SpectralDense(features[0], coeff), Swish(), nn.Dense(dim)))


careless = model.clone(make_branch=careless_branch)
careless_variables = train(careless)
certificate = ir.certify(careless, careless_variables)
print("certified:", certificate.certified)
for block in certificate.failures:
    print(f"  {block.name}: {block.problem}")

# %% [markdown]
# Is it invertible all the same? Nobody knows; the inverse has to be tried, point by point. Both
# networks map data to latents and back. Orange points did not return to where they were: some
# iterations diverged, others ended at *another* point with the same latent.

# %%
points = pinwheel(rng, 5_000)
there_and_back = jax.jit(lambda flow, x: flow.inverse(flow.forward(x)))
results = {}
for name, trained in (("certified", flow), ("careless", careless.flow(careless_variables))):
    back, info = there_and_back(trained, points)
    error = np.asarray(jnp.linalg.norm(back - points, axis=1))
    converged = np.asarray(info.converged.all(axis=0))
    results[name] = back, converged & (error < 1e-3)
    print(f"{name}: {converged.mean():.1%} converged; largest error {np.nanmax(error):.2g}")

# %% tags=["hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for axes, (name, (_, good)) in zip(panels, results.items(), strict=True):
    axes.scatter(*points[good].T, s=2, lw=0, color="#2f6fb3")
    axes.scatter(*points[~good].T, s=5, lw=0, color="#d9622b")
    axes.set(title=f"{name}: {1 - good.mean():.1%} of the points lost", xticks=[], yticks=[])
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal")

# %% [markdown]
# If you can bound your module, give it a `lipschitz_bound(variables)`. It is called with concrete
# weights, outside of `jit`, for every block. It may compute anything, as long as the number is
# never too small. For `nn.Dense` that would be the norm of its kernel, and the certificate would
# tell you that it is above 1.
