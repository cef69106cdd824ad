from pallas_kernels.grouped_matmul.api import grouped_matmul, weight_gradient

__all__ = ["grouped_matmul", "weight_gradient"]
