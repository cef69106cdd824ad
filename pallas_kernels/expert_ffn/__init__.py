from pallas_kernels.expert_ffn.api import expert_ffn, expert_ffn_of_stack

__all__ = ["expert_ffn", "expert_ffn_of_stack"]
