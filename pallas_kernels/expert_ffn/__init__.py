"""expert_ffn: gate, up, SwiGLU, down and routing weight, over rows sorted by expert.

api.py holds the public functions: it checks the arguments and chooses the implementation.
reference.py is the dense form, for tests. cpu.py is plain JAX: loops over blocks of rows, work
proportional to the rows; Blackwell GPUs run it too. mosaic_tpu.py has a TPU's two kernels, forward
and backward, and tiles_tpu.py the sizes of their tiles by chip. mosaic_gpu.py has those of Hopper
GPUs. Where an expert does not fit on chip, TPU and GPU take the products of grouped_matmul/.
window.py holds the copies that an implementation makes which cannot read its experts in a run of
layers, or write their gradients there.
"""

from pallas_kernels.expert_ffn.api import empty_like, expert_ffn, expert_ffn_of_run, unread

__all__ = ["empty_like", "expert_ffn", "expert_ffn_of_run", "unread"]
