"""grouped_matmul: one weight matrix per expert over rows sorted by expert, and its gradients.

api.py: the public functions; checks arguments and dispatches. reference.py: dense form, for tests.
cpu.py: plain JAX, a loop over blocks of rows, work proportional to the rows; Blackwell GPUs run it
too. mosaic_tpu.py: the TPU's kernels for the product and the weight gradient, and the cost model
that chooses their tiles. mosaic_gpu.py: the kernels for Hopper GPUs, and the split of float32 into
bfloat16 parts.
"""

from pallas_kernels.grouped_matmul.api import grouped_matmul, weight_gradient

__all__ = ["grouped_matmul", "weight_gradient"]
