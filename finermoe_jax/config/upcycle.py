"""Upcycling config, dense FFN to experts: its fields, and the architectures each one fits."""

import dataclasses

from finermoe_jax.config.model import MoEConfig, check_fields
from finermoe_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """The choices in turning a dense FFN into experts that the architecture leaves open.

    The defaults are the published start: copies of slices, everything new from normal(0, 0.02).
    finermoe_jax/weights/upcycle.py computes it, docs/architectures.md states the formulas.

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

    # Drop-upcycling: share of the intermediate channels that each expert redraws.
    drop_ratio: float = 0.0
    # NVShard: one router row for all slices of a copy, so that whole copies are chosen.
    virtual_groups: bool = False
    # Starts at the dense model's logits. Only the shared expert contributes, with its gate's 1/2
    # compensated; every routed down-projection is zero.
    function_preserving: bool = False
    # Standard deviation of concat_proj; 0 gives zeros.
    concat_proj_std: float = 0.02

    def __post_init__(self) -> None:
        check_fields(self)
        for name, number, high in (
            ("drop_ratio", self.drop_ratio, 1),
            ("concat_proj_std", self.concat_proj_std, 1e6),
        ):
            if not 0 <= number <= high:  # also refuses NaN
                raise InputError(f"upcycle.{name}={number} must lie between 0 and {high}")
        if self.drop_ratio and self.function_preserving:
            raise InputError(
                f"upcycle.drop_ratio={self.drop_ratio} redraws down-projections that "
                "upcycle.function_preserving=True starts at zero; set one of them to its default"
            )
        if self.function_preserving and not self.concat_proj_std:
            raise InputError(
                f"upcycle.concat_proj_std={self.concat_proj_std} with "
                "upcycle.function_preserving=True: projection and experts' outputs would both be "
                "zero, and stay so, since each one's gradient is a multiple of the other; set one "
                "of them to its default"
            )

    def check(self, moe: MoEConfig | None) -> None:
        """Raises InputError, naming both values, where `moe` cannot start as this says."""
        for name, reason in _against(moe):
            value = getattr(self, name)
            if value != getattr(PUBLISHED_UPCYCLING, name):
                raise InputError(f"upcycle.{name}={value} does not go with {reason}")


def _against(moe: MoEConfig | None) -> list[tuple[str, str]]:
    """Fields of UpcycleConfig, and what of `moe` each does not go with."""
    if moe is None:
        dense = "moe=None, a dense model"
        return [(field.name, dense) for field in dataclasses.fields(UpcycleConfig)]
    shared, slots = moe.shared_expert_intermediate_size, moe.output_granularity
    slices, active = moe.intermediate_granularity, moe.active_per_group
    found = (
        ("virtual_groups", shared != 0, f"shared_expert_intermediate_size={shared}; it needs 0"),
        ("virtual_groups", slots != 1, f"output_granularity={slots}; it needs 1"),
        ("virtual_groups", active % slices, f"active_per_group={active}; it needs a multiple of "
         f"moe.intermediate_granularity={slices}"),
        ("virtual_groups", moe.pre_softmax, "pre_softmax=True; it needs False"),
        ("virtual_groups", moe.separate_routers, "separate_routers=True; it needs False"),
        ("function_preserving", moe.concat_proj == "all", "concat_proj=all, which projects the "
         "shared expert's output, too"),
        ("function_preserving", shared == 0,
         "shared_expert_intermediate_size=0; it needs a shared expert"),
        ("concat_proj_std", moe.concat_proj == "none", "concat_proj=none"),
    )  # fmt: skip
    return [(name, f"moe.{reason}") for name, contradicts, reason in found if contradicts]


PUBLISHED_UPCYCLING = UpcycleConfig()
