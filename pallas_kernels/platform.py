"""Which platform the kernels of a computation are for."""

from typing import Literal, cast, get_args

import jax

Platform = Literal["cpu", "tpu", "gpu"]


def platform() -> Platform:
    """The platform being compiled for: of the abstract mesh's device, else JAX's default backend.

    A mesh set by `jax.sharding.use_abstract_mesh` names a device where the program is compiled
    ahead of time for a platform that this machine lacks.

    Raises:
      NotImplementedError: neither cpu, tpu nor gpu.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    if name in ("cuda", "rocm"):  # a device's name for what the default backend calls gpu
        name = "gpu"
    if name not in get_args(Platform):
        raise NotImplementedError(f"platform {name!r}; kernels exist for {get_args(Platform)}")
    return cast(Platform, name)
