from pallas_kernels.expert_ffn.api import Implementation, expert_ffn

__all__ = ["Implementation", "expert_ffn"]
