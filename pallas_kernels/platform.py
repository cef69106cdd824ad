"""The platform that a program is compiled for, and the implementation of its kernels."""

from typing import Any, Literal, cast, get_args

import jax

Platform = Literal["cpu", "tpu", "gpu"]
Implementation = Literal["reference", "cpu", "tpu", "gpu"]


def platform() -> Platform:
    """Returns the platform compiled for: that of the abstract mesh's device, or JAX's default.

    `jax.sharding.use_abstract_mesh` sets such a mesh when a program is compiled ahead of time for a
    platform that the host lacks.

    Raises:
      NotImplementedError: neither cpu, tpu nor gpu.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    if name in ("cuda", "rocm"):  # device platforms of the backend "gpu"
        name = "gpu"
    if name not in get_args(Platform):
        raise NotImplementedError(f"platform {name!r}; kernels exist for {get_args(Platform)}")
    return cast(Platform, name)


def choose(implementation: Implementation | None, interpret: Any) -> Implementation:
    """Returns `implementation`, or the platform's if it is None.

    Raises:
      ValueError: an unknown implementation, or interpret for one without a Pallas kernel.
      NotImplementedError: a platform without kernels, or another platform's kernel without
        interpret.
    """
    chosen: Implementation = platform() if implementation is None else implementation
    if chosen not in get_args(Implementation):
        raise ValueError(
            f"implementation={chosen!r} must be None or one of {get_args(Implementation)}"
        )
    if interpret and chosen in ("reference", "cpu"):
        raise ValueError(
            f"interpret={interpret}: implementation={chosen!r} has no Pallas kernel; choose "
            "'tpu' or 'gpu'"
        )
    if chosen in ("tpu", "gpu") and not interpret and chosen != platform():
        raise NotImplementedError(
            f"implementation={chosen!r} is compiled for a {chosen}, but this program for a "
            f"{platform()}: pass implementation=None, or interpret=True to try the kernel here"
        )
    return chosen
