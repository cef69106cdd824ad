"""Kernels for routed experts. They import nothing of finermoe_jax and serve any mixture."""
