"""FineRMoE in JAX: two-dimensional fine-grained experts, upcycled from dense Qwen2.5 models.

__init__.pyi lists the public names. Each is imported on first use: `import finermoe_jax` alone
loads neither JAX nor Orbax.
"""

import lazy_loader

from finermoe_jax.runtime.devices import skip_absent_tpu

__version__ = "0.1.0"

skip_absent_tpu()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
