"""How a dense FFN becomes experts: the fields, and which of them go with which architecture."""

import dataclasses

from finermoe_jax.config.model import MoEConfig, check_fields
from finermoe_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """How a dense FFN becomes experts, where the architecture alone does not say it.

    The defaults are the published start: copies of slices, everything new from normal(0, 0.02).
    finermoe_jax/weights/upcycle.py computes it, docs/architectures.md states the formulas.
    """

    # Drop-upcycling: share of the intermediate channels that each expert redraws.
    drop_ratio: float = 0.0
    # NVShard: one router row for all slices of a copy, so that whole copies are chosen.
    virtual_groups: bool = False
    # Starts at the dense model's logits: the shared expert alone speaks, with its gate's 1/2
    # made good, and every routed down-projection is zero.
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
        against: dict[str, list[str]] = {field.name: [] for field in dataclasses.fields(self)}
        if moe is None:
            for reasons in against.values():
                reasons.append("moe=None, a dense model")
        else:
            shared = moe.shared_expert_intermediate_size
            if moe.concat_proj == "none":
                against["concat_proj_std"].append("moe.concat_proj=none")
            if moe.concat_proj == "all":
                against["function_preserving"].append(
                    "moe.concat_proj=all, which projects the shared expert's output, too"
                )
            if shared == 0:
                against["function_preserving"].append(
                    "moe.shared_expert_intermediate_size=0; it needs a shared expert"
                )
            else:
                against["virtual_groups"].append(
                    f"moe.shared_expert_intermediate_size={shared}; it needs 0"
                )
            if moe.output_granularity != 1:
                against["virtual_groups"].append(
                    f"moe.output_granularity={moe.output_granularity}; it needs 1"
                )
            if moe.active_per_group % moe.intermediate_granularity:
                against["virtual_groups"].append(
                    f"moe.active_per_group={moe.active_per_group}; it needs a multiple of "
                    f"moe.intermediate_granularity={moe.intermediate_granularity}"
                )
            for name in ("pre_softmax", "separate_routers"):
                if getattr(moe, name):
                    against["virtual_groups"].append(f"moe.{name}=True; it needs False")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and against[field.name]:
                raise InputError(
                    f"upcycle.{field.name}={value} does not go with {against[field.name][0]}"
                )


PUBLISHED_UPCYCLING = UpcycleConfig()
