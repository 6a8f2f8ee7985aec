"""Training of what is too small, or too foreign, for the programs: seconds, in one scan."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax


def fit(
    loss: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]],
    variables: Mapping[str, Any],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Minimise ``loss(params, state, key) -> (value, new state)`` by Adam, its rate on a cosine.

    Args:
      loss: one step's loss, on data that it draws by its key.
      variables: "params", and whatever else the loss advances.
      steps: how many.
      learning_rate: at the start.
      seed: of the keys.

    Returns:
      The last parameters and state.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(learning_rate, steps)),
    )
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def step(carry, key):
        params, state, opt_state = carry
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), value

    @jax.jit
    def train(params, state):
        keys = jax.random.split(jax.random.key(seed), steps)
        carry = (params, state, optimizer.init(params))
        return jax.lax.scan(step, carry, keys)[0][:2]

    return train(variables["params"], state)
