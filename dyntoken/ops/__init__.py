"""Token operators: pure `jax.numpy`, no Flax, no state, static shapes."""
