"""README.md of an exported directory: the Hub's model card.

A card states only what is known: from the config, from the source's own card, and from the logs of
the run. Anything else is omitted.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.run import RunConfig
from finermoe_jax.config.upcycle import PUBLISHED_UPCYCLING, UpcycleConfig
from finermoe_jax.model.counts import true_counts

CARD_FILE = "README.md"
_ANYWHERE = "path/to/this/directory"
_LICENSE = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The published model that weights come from, and how they were upcycled.

    Checkpoints carry it, so that a later export can state it.
    """

    # Hub ids. Empty: unknown.
    base_model: tuple[str, ...] = ()
    # Licence of the base model, as its card states it. Empty: unknown.
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    # None: not upcycled, or unknown.
    upcycling: UpcycleConfig | None = None


UNKNOWN = Origin()


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """The training run that saved a checkpoint, up to that step.

    Attributes:
      config: the run's config.
      step: the checkpoint's step.
      tokens: training tokens up to the step, without padding; None: unknown.
      held_out: held-out losses, nats per token, by step.
    """

    config: RunConfig
    step: int
    tokens: int | None
    held_out: Mapping[int, float]


def read_origin(directory: Path, hub_id: str | None) -> Origin:
    """Returns the origin of a Hugging Face directory, from its card.

    Args:
      directory: the directory; its card may be missing.
      hub_id: the Hub id it was downloaded from, if any. It is then the base model. A local
        directory's base model is the one that its card names.
    """
    from huggingface_hub import metadata_load

    found: Any = None
    # A card of unknown content must not stop a conversion.
    with contextlib.suppress(Exception):
        found = metadata_load(directory / CARD_FILE)
    card = found if isinstance(found, dict) else {}
    base = card.get("base_model")
    listed = [base] if isinstance(base, str) else base if isinstance(base, list) else []
    named = (hub_id,) if hub_id else tuple(each for each in listed if isinstance(each, str))
    terms = {key: card[key] for key in _LICENSE if isinstance(card.get(key), str)}
    return Origin(base_model=named, **terms)


def upcycled_origin(
    origin: Origin, source: ModelConfig, target: ModelConfig, upcycling: UpcycleConfig
) -> Origin:
    """Returns the origin of a target that was upcycled from a source with this origin.

    If the source has experts already, its origin stays.
    """
    if source.moe is not None or target.moe is None:
        return origin
    return dataclasses.replace(origin, upcycling=upcycling)


def model_card(
    config: ModelConfig, origin: Origin, run: TrainingRun | None = None, name: str | None = None
) -> str:
    """Returns the text of README.md.

    Args:
      config: the exported architecture.
      origin: the source of the weights.
      run: the run that trained them, if known.
      name: the Hub id that the directory is sent to, for the examples.
    """
    from huggingface_hub import ModelCardData

    upcycled = origin.upcycling is not None
    licence: dict[str, Any] = {key: getattr(origin, key) or None for key in _LICENSE}
    data = ModelCardData(
        base_model=_one_or_all(origin.base_model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(config.moe, upcycled),
        **licence,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        _introduction(config, origin),
        _architecture(config),
        _start(config, origin, run),
        _training(run) if run else "",
        _loading(config, name or _ANYWHERE),
        _terms(origin),
        _CITATION if config.moe else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _one_or_all(names: tuple[str, ...]) -> str | list[str] | None:
    return names[0] if len(names) == 1 else list(names) or None


def _tags(moe: MoEConfig | None, upcycled: bool) -> list[str]:
    experts = ["finermoe", "moe", "mixture-of-experts", "arxiv:2603.13364"] if moe else []
    return [*experts, *(["upcycling"] if upcycled else []), "finermoe-jax"]


def _introduction(config: ModelConfig, origin: Origin) -> str:
    base = " and ".join(origin.base_model)
    source = f" from {base}" if base else ""
    if config.moe is None:
        return f"# Dense language model{source}\n\nExported by finermoe-jax."
    return (
        f"# FineRMoE{source}\n\n"
        "A language model with a mixture of experts (FineRMoE, "
        "[arXiv 2603.13364](https://arxiv.org/abs/2603.13364)). Exported by finermoe-jax."
    )


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _architecture(config: ModelConfig) -> str:
    counts = true_counts(config)
    rows: dict[str, Any] = {
        "parameters": f"{counts.total:,}",
        "layers": config.num_hidden_layers,
        "hidden size h": config.hidden_size,
        "intermediate size H": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context, tokens": config.context_length,
    }
    if moe := config.moe:
        rows |= {
            "parameters active for a token": f"{counts.active:,}",
            "layers with experts": config.layer_kinds.count("moe"),
            "intermediate granularity G_I": moe.intermediate_granularity,
            "output granularity G_O": moe.output_granularity,
            "intermediate expansion R_I": moe.intermediate_expansion,
            "output expansion R_O": moe.output_expansion,
            "active experts per output slot T_I": moe.active_per_group,
            "experts per layer": moe.num_experts,
            "experts active for a token": moe.num_active,
            "width of the shared expert": config.shared_expert_size or "no shared expert",
            "layers that share a pool of experts": (
                moe.experts_across if moe.experts_across > 1 else None
            ),
            "layers by which routers read ahead": moe.route_ahead or None,
        }
    return f"## Architecture\n\n{_table(rows)}"


def _start(config: ModelConfig, origin: Origin, run: TrainingRun | None) -> str:
    """Returns the section on the weights before training; empty if nothing is known."""
    if run is not None and not run.config.init_from:
        return "## How it was made\n\nTraining started from random weights."
    start = origin.upcycling
    if start is None or config.moe is None:
        return ""
    text = (
        "## How it was made\n\nA dense model was upcycled: its FFNs were cut into the experts "
        "(equations 9 and 10 of the paper)."
    )
    if config.shared_expert_size:
        text += " The shared expert is the whole dense FFN."
    if start == PUBLISHED_UPCYCLING:
        return text + " Upcycling used the paper's settings."
    changed = {
        f"upcycle.{field.name}": getattr(start, field.name)
        for field in dataclasses.fields(start)
        if getattr(start, field.name) != getattr(PUBLISHED_UPCYCLING, field.name)
    }
    return f"{text} These settings differ from the paper's:\n\n{_table(changed)}"


def _training(run: TrainingRun) -> str:
    config = run.config
    optimizer, balance = config.optimizer, config.balance
    losses = sorted(run.held_out.items())
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    rows = {
        "steps": f"{run.step:,} of {config.train.steps:,}",
        "tokens, without padding": None if run.tokens is None else f"{run.tokens:,}",
        "tokens per sequence": config.data.sequence_length,
        "sequences per step": config.data.global_batch_size,
        "optimizer": optimizer.name,
        "learning rate": (
            f"{optimizer.learning_rate:g}, {optimizer.schedule} to "
            f"{optimizer.final_learning_rate:g} at step {config.train.steps:,}"
        ),
        "compute dtype": config.train.compute_dtype,
        "parts not trained": ", ".join(config.train.freeze) or None,
        "balancing": _balancing(config.moe, balance.kind, balance.weight, balance.z_loss),
    }
    for at in dict.fromkeys([first, last]):
        if at is not None:
            rows[f"held-out loss after step {at[0]:,}, nats per token"] = f"{at[1]:.4f}"
    return f"## Training\n\n{_table(rows)}"


def _balancing(moe: MoEConfig | None, kind: str, weight: float, z_loss: float) -> str | None:
    if moe is None:
        return None
    loss = f", weight {weight:g}" if kind in ("sequence", "batch") else ""
    return f"{kind}{loss}" + (f", z-loss {z_loss:g}" if z_loss else "")


def _loading(config: ModelConfig, name: str) -> str:
    trusted = ", trust_remote_code=True" if config.moe else ""
    note = ""
    if config.moe:
        note = (
            "\n\n`trust_remote_code=True` runs the two Python files beside the weights. They "
            "import only torch and transformers."
        )
    return f"""## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trusted})
model = AutoModelForCausalLM.from_pretrained("{name}"{trusted})
```{note}

With finermoe-jax, which runs no code from this directory:

```python
import finermoe_jax as fm

model = fm.load_hf("{name}")
```"""


def _terms(origin: Origin) -> str:
    if origin.license:
        return f"## Licence\n\nThe base model's: {origin.license_name or origin.license}."
    return "## Licence\n\nThe licence is not known here, so none is stated."


_CITATION = """## Citation

```bibtex
@misc{finermoe2026,
  title = {FineRMoE},
  author = {Liao and Wang and Qin and Yan},
  year = {2026},
  eprint = {2603.13364},
  archivePrefix = {arXiv},
  url = {https://arxiv.org/abs/2603.13364},
}
```"""
