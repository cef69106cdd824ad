"""FineRMoE in JAX: experts fine in two dimensions, upcycled from dense Qwen2.5 models.

__init__.pyi lists the public names and where they live. Each is imported when it is first used, so
that `import finermoe_jax` loads neither JAX nor Orbax.
"""

import lazy_loader

from finermoe_jax.runtime.devices import skip_absent_tpu

__version__ = "0.1.0"

skip_absent_tpu()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
