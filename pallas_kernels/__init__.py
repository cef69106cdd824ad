"""Kernels for routed experts. They import nothing of finermoe_jax and serve any mixture.

* `expert_ffn/`: a whole SwiGLU expert, forward and backward. `grouped_matmul/`: one product per
  expert. Each has an api.py, which checks arguments and chooses, and one file per implementation.
* platform.py says which implementation a program gets.
* A CPU's share: blocks.py, the blocks of rows that its loops run over, and written_out.py, its sums
  for a few rows. A TPU's: schedule.py, the order in which a kernel visits tiles and experts. A
  Hopper GPU's: hopper.py, how a block copies, multiplies and stores.
"""
