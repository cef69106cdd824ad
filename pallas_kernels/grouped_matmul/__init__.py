"""grouped_matmul: one weight matrix per expert over rows sorted by expert, and its gradients.

api.py holds the public functions: it checks the arguments and chooses the implementation.
reference.py is the dense form, for tests. cpu.py is plain JAX: a loop over blocks of rows, work
proportional to the rows; Blackwell GPUs run it too. mosaic_tpu.py has a TPU's kernels, the product
and the weight gradient, with the model that chooses their tiles. mosaic_gpu.py has those of Hopper
GPUs, and the split of float32 into bfloat16 parts.
"""

from pallas_kernels.grouped_matmul.api import grouped_matmul, weight_gradient

__all__ = ["grouped_matmul", "weight_gradient"]
