"""Kernels for routed experts. They import nothing from finermoe_jax and work for any mixture.

* `expert_ffn/`: a whole SwiGLU expert, forward and backward. `grouped_matmul/`: one product per
  expert. Each has an api.py, which checks arguments and dispatches, and one file per
  implementation.
* platform.py chooses the implementation.
* CPU: blocks.py (blocks of rows that loops run over), unrolled.py (unrolled sums for a few rows).
  TPU: schedule.py (order of tiles and experts). Hopper GPU: hopper.py (how a block copies,
  multiplies and stores).
"""
