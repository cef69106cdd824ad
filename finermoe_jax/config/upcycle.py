"""The config of upcycling, and checks that it fits an architecture."""

import dataclasses
from typing import Literal

from finermoe_jax.config.model import MoEConfig, check_fields
from finermoe_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """Initialisation of the experts from a dense FFN.

    The defaults are the published start: experts are copied slices, and new weights are drawn from
    normal(0, 0.02). docs/architectures.md has the formulas, finermoe_jax/weights/upcycle.py the
    code.

    Raises:
      InputError: a number outside its range, or fields that contradict each other.

    Examples:
      >>> import jax
      >>> import finermoe_jax as fm
      >>> dense = fm.load_hf("finermoe_jax/demo/model")
      >>> moe = fm.MoEConfig(intermediate_granularity=8)
      >>> start = fm.UpcycleConfig(drop_ratio=0.5)
      >>> model = fm.upcycle_model(dense, moe, jax.random.key(0), start)
    """

    # Drop-upcycling: share of intermediate channels that each expert reinitialises.
    drop_ratio: float = 0.0
    # Noise on each expert's matrices, as a share of their standard deviation: copies of a slice
    # then start different.
    copy_noise: float = 0.0
    # NVShard: one router row for all slices of a copy, so that initially whole copies are selected.
    virtual_groups: bool = False
    # Reproduces the dense model's logits at the start: every routed down-projection is zero, and
    # the shared expert compensates for its gate's initial 1/2.
    function_preserving: bool = False
    # Standard deviation of concat_proj; 0 gives zeros.
    concat_proj_std: float = 0.02
    # Router rows of other layers' experts (moe.experts_across): drawn like a layer's own, or zero.
    # train.psr_mask=foreign masks these experts at first.
    reuse_start: Literal["random", "zero"] = "random"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, number, high in (
            ("drop_ratio", self.drop_ratio, 1),
            ("copy_noise", self.copy_noise, 1e3),
            ("concat_proj_std", self.concat_proj_std, 1e6),
        ):
            if not 0 <= number <= high:  # also rejects NaN
                raise InputError(f"upcycle.{name}={number} must be between 0 and {high}")
        if self.drop_ratio and self.function_preserving:
            raise InputError(
                f"upcycle.drop_ratio={self.drop_ratio} reinitialises down-projections that "
                "upcycle.function_preserving=True sets to zero; set one of them to its default"
            )
        if self.function_preserving and not self.concat_proj_std:
            raise InputError(
                f"upcycle.concat_proj_std={self.concat_proj_std} with "
                "upcycle.function_preserving=True makes the projection and the experts' outputs "
                "zero, and their gradients too; set one of them to its default"
            )

    def check(self, moe: MoEConfig | None) -> None:
        """Raises InputError if these settings do not apply to `moe`."""
        for name, reason in _conflicts(moe):
            value = getattr(self, name)
            if value != getattr(PUBLISHED_UPCYCLING, name):
                raise InputError(f"upcycle.{name}={value} is incompatible with {reason}")


def _conflicts(moe: MoEConfig | None) -> list[tuple[str, str]]:
    """Returns each field of UpcycleConfig that must keep its default, with the reason."""
    if moe is None:
        dense = "moe=None, a dense model"
        return [(field.name, dense) for field in dataclasses.fields(UpcycleConfig)]
    shared, slots = moe.shared_expert_intermediate_size, moe.output_granularity
    across = moe.experts_across
    slices, active = moe.intermediate_granularity, moe.active_per_group
    found = (
        ("virtual_groups", shared != 0, f"shared_expert_intermediate_size={shared}; it needs 0"),
        ("virtual_groups", slots != 1, f"output_granularity={slots}; it needs 1"),
        ("virtual_groups", active % slices, f"active_per_group={active}; it needs a multiple of "
         f"moe.intermediate_granularity={slices}"),
        ("virtual_groups", moe.pre_softmax, "pre_softmax=True; it needs False"),
        ("virtual_groups", moe.separate_routers, "separate_routers=True; it needs False"),
        ("virtual_groups", across > 1, f"experts_across={across}; it needs 1, since every slice "
         "of a copy must be a layer's own"),
        ("reuse_start", across == 1, "experts_across=1; no layers share their experts"),
        ("function_preserving", moe.concat_proj == "all", "concat_proj=all, which also projects "
         "the shared expert's output"),
        ("function_preserving", shared == 0,
         "shared_expert_intermediate_size=0; it needs a shared expert"),
        ("concat_proj_std", moe.concat_proj == "none", "concat_proj=none"),
    )  # fmt: skip
    return [(name, f"moe.{reason}") for name, contradicts, reason in found if contradicts]


PUBLISHED_UPCYCLING = UpcycleConfig()
