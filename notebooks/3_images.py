# %% [markdown]
# # 3 · An image model: trained, certified, inverted
#
# At the end you will have a density model of handwritten digits, trained here in about a minute; a
# proof that it is invertible; digits recovered from their latents; new digits; and a walk from one
# digit to another through latent space.

# %% tags=["hide-input"]
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import iresnet_jax as ir

SMOKE = os.environ.get("IRESNET_JAX_SMOKE") == "1"  # CI runs every cell, with fewer steps
BLUE, ORANGE, INK = "#2f6fb3", "#d9622b", "#1f2933"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})


def show(rows, **options):
    """Rows of images, by their titles."""
    count = len(next(iter(rows.values())))
    figure, panels = plt.subplots(
        len(rows), count, figsize=(0.8 * count + 1, 0.9 * len(rows)), squeeze=False
    )
    for line, (title, images) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image[..., 0], **({"cmap": "gray", "vmin": 0, "vmax": 1} | options))
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    return figure


# %% [markdown]
# ## Data and model
#
# scikit-learn's digits: 1,797 images of 8×8 pixels with 17 grey levels; a fifth is held out for the
# test. Grey levels are integers, but a density is over real numbers. `dequantize` adds uniform
# noise of less than one level.

# %%
LEVELS = 17
images = load_digits().images.astype(np.int32)[..., None]
images = images[np.random.default_rng(0).permutation(len(images))]
train, test = images[:1437], images[1437 : 1457 if SMOKE else None]

model = ir.nn.ImageFlow(
    image_shape=(8, 8, 1),
    depths=(1, 1) if SMOKE else (4, 4, 4),
    features=32,
    coeff=0.97,
    domain="logit",
)
first = ir.dequantize(jax.random.key(0), train[:256], LEVELS)
variables = jax.jit(model.init)(jax.random.key(1), first)
print(
    ir.nn.num_parameters(variables),
    "parameters; latents of shapes",
    model.flow(variables).latent_shapes(),
)

# %% [markdown]
# ## Training
#
# The loss is the negative log-likelihood. Five terms of the trace series and one probe are enough
# for its gradient; the likelihood reported afterwards takes more of both.

# %%
NUM_STEPS, BATCH = (3, 16) if SMOKE else (800, 64)
optimizer = optax.adam(optax.cosine_decay_schedule(6e-3, NUM_STEPS))
estimator = ir.TruncatedSeries(num_terms=5)


@jax.jit
def train_step(variables, opt_state, batch, key):
    noise_key, probe_key = jax.random.split(key)
    x = ir.dequantize(noise_key, batch, LEVELS)

    def loss(params):
        flow, state = model.advance({**variables, "params": params})
        return -flow.log_prob(x, estimator, key=probe_key).mean(), state

    (nats, state), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    change, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(variables["params"], change)
    return {"params": params, **state}, opt_state, nats


rng, curve = np.random.default_rng(1), []
opt_state = optimizer.init(variables["params"])
for step in range(NUM_STEPS):
    batch = train[rng.integers(len(train), size=BATCH)]
    key = jax.random.fold_in(jax.random.key(2), step)
    variables, opt_state, nats = train_step(variables, opt_state, batch, key)
    curve.append(float(ir.bits_per_dim(-nats, 64, LEVELS)))

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(curve, color=BLUE, lw=0.8)
axes.axhline(np.log2(LEVELS), color=INK, lw=0.8, ls=":")
axes.text(len(curve), np.log2(LEVELS), "uniform", ha="right", va="bottom", fontsize=9)
axes.set(xlabel="step", ylabel="bits per dimension", title="Training")
_ = axes.set_ylim(min(curve) - 0.2, 5)

# %% [markdown]
# ## The certificate
#
# During training, one step of power iteration per batch estimates the norms. Before we rely on
# them, `converge` runs every power iteration to its tolerance. Then `certify` bounds every layer
# *from above*. A block with L < 1 is proved to be invertible.

# %%
variables = jax.jit(partial(ir.nn.converge, model))(variables)
certificate = ir.certify(model, variables)
print("certified invertible:", certificate.certified)
print(f"largest L of a block: {max(certificate.lipschitz):.3f}")
print(f"Lip(F) ≤ {certificate.forward:.3g},  Lip(F⁻¹) ≤ {certificate.inverse:.3g}")

# %% [markdown]
# The bound L of a block is of its branch as a whole, and at most the product of its layers' bounds.
# It holds for all inputs, so it is cautious. The plot shows beside it the largest singular value of
# the Jacobian at some test digits, which is the quantity that it bounds.

# %%
flow = model.flow(variables)
x = ir.dequantize(jax.random.key(3), test, LEVELS)


@jax.jit
def branch_norms(block, h):
    """The largest singular value of the Jacobian of g at each sample."""
    actnorm, residual = block.links
    h = actnorm.forward(h)
    jacobian = jax.vmap(jax.jacfwd(lambda a: residual.branch(a[None])[0].ravel()))(h)
    return jnp.linalg.norm(jacobian.reshape(len(h), h[0].size, -1), 2, axis=(1, 2))


norms, h = [], x[:16]
for level in flow.levels:
    *entrance, stack = level.links
    for transform in entrance:
        h = transform.forward(h)
    for block in stack.unstacked():
        norms.append(branch_norms(block, h))
        h = block.forward(h)
    h = h[..., h.shape[-1] // 2 :]  # half of the channels leave, but after the last level

# %% tags=["hide-input"]
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
place = np.arange(len(norms))
axes.plot(place, np.array(norms), "o", color=BLUE, ms=4, alpha=0.4, mew=0)
axes.plot([], [], "o", color=BLUE, ms=4, label="‖J_g‖ at 16 digits")
axes.plot(
    place, certificate.lipschitz, "_", color=ORANGE, ms=20, mew=2.5, label="certified bound L"
)
axes.axhline(1, color=INK, lw=0.8, ls=":")
axes.text(len(norms) - 0.6, 1.0, "invertible below", ha="right", va="bottom", fontsize=9)
axes.set(xlabel="block", xticks=place, ylim=(0, 1.15), title="How steep the blocks are")
_ = axes.legend(frameon=False, loc="lower left")

# %% [markdown]
# ## The likelihood, with its errors
#
# There are three errors. The *bias* of the truncated series is bounded by means of L: we take
# enough terms to make it small. The *noise* of probes and dequantisation shows in their spread. The
# *sampling* error, of 360 test images, is what it is.

# %%
terms = 3 if SMOKE else 80
estimator = ir.TruncatedSeries(terms)
bias = certificate.bias_bound(estimator)
log_prob = jax.jit(lambda x, key: flow.log_prob(x, estimator, key=key))
bits = []
for draw in range(1 if SMOKE else 4):
    noise_key, probe_key = jax.random.split(jax.random.fold_in(jax.random.key(4), draw))
    noisy = ir.dequantize(noise_key, test, LEVELS)
    bits.append(np.asarray(ir.bits_per_dim(log_prob(noisy, probe_key), 64, LEVELS)))
per_image = np.mean(bits, axis=0)
noise = np.std(bits, axis=0).mean() / np.sqrt(len(bits) * len(test))
print(f"held out: {per_image.mean():.3f} bits/dim")
print(f"bias of the series at most {bias / (64 * np.log(2)):.4f}, noise about {noise:.4f}")
print(f"standard error over the test images {per_image.std() / np.sqrt(len(test)):.3f}")

# %% [markdown]
# ## There and back
#
# Test digits are mapped to latents and back, by fixed-point iteration, block by block. The report
# says how that went for each image and block.

# %%
flow = flow.with_bounds(certificate)
there_and_back = jax.jit(lambda flow, x: flow.inverse(flow.forward(x)))
recovered, info = there_and_back(flow, x)
print("all converged:", bool(info.converged.all()), " most steps:", int(info.num_steps.max()))
print(f"largest error of a pixel: {float(jnp.abs(recovered - x).max()):.1e}")
print(f"certified, one block    : {float(info.error_bound.max()):.1e}")

# %% tags=["hide-input"]
error = jnp.abs(recovered - x)
largest = float(error.max())
_ = show(
    {"digit": x[:10], "recovered": recovered[:10], f"error / {largest:.0e}": error[:10] / largest}
)

# %% [markdown]
# The same weights *without* the constraint: with `coeff=None` the kernels are used as stored, and
# nothing keeps their norms below one. The same iteration diverges, and the report says so.

# %%
vanilla = model.clone(coeff=None).flow(variables)
print("bounds L of its blocks:", [f"{bound:.1f}" for bound in ir.certify(vanilla).lipschitz])
lost, info = there_and_back(vanilla, x)
print("converged:", f"{float(info.converged.all(axis=0).mean()):.0%} of the images")
_ = show({"digit": x[:10], "‘recovered’": jnp.nan_to_num(lost[:10])})

# %% [markdown]
# ## New digits
#
# Draw latents from the prior, and invert. A lower temperature narrows the prior: fewer surprises,
# less variety.

# %%
draw = jax.jit(lambda key, temperature: flow.sample(key, 10, temperature=temperature))
rows = {}
for temperature in (0.6, 0.8, 1.0):
    new, info = draw(jax.random.key(5), temperature)
    assert SMOKE or bool(info.converged.all())
    rows[f"T = {temperature}"] = new
_ = show({"data": x[10:20], **rows})

# %% [markdown]
# ## A walk through latent space
#
# Take the straight line between the latents of two digits. Back in the space of images it bends
# around what does not look like a digit. Below it is the straight line between the pixels.

# %%
ends = flow.forward(x[jnp.array([0, 4])])
t = jnp.linspace(0, 1, 10).reshape(-1, 1, 1, 1)
walk, info = jax.jit(flow.inverse)(tuple((1 - t) * z[0] + t * z[1] for z in ends))
blend = (1 - t) * x[0] + t * x[4]
_ = show({"through latents": walk, "through pixels": blend})

# %% [markdown]
# For the same as a program, with checkpoints, evaluation and more data sets, see
# `python -m train density` ([Training](../TRAINING.md)).
