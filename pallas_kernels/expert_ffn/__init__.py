"""expert_ffn: gate, up, SwiGLU, down and routing weight, over rows sorted by expert.

api.py: the public functions; checks arguments and dispatches. reference.py: dense form, for tests.
cpu.py: plain JAX, loops over blocks of rows, work proportional to the rows; Blackwell GPUs run it
too. mosaic_tpu.py: the TPU's forward and backward kernels; tiles_tpu.py: their tile sizes by chip.
mosaic_gpu.py: the kernels for Hopper GPUs. If an expert does not fit on chip, TPU and GPU use the
products of grouped_matmul/. window.py: copies, for implementations that cannot read experts or
write gradients in place in a run of layers.
"""

from pallas_kernels.expert_ffn.api import empty_like, expert_ffn, expert_ffn_of_run, unread

__all__ = ["empty_like", "expert_ffn", "expert_ffn_of_run", "unread"]
