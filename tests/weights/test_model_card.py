"""Model cards of exports: what they state, and what they leave out."""

import dataclasses
import json
import shutil

import pytest
from huggingface_hub import ModelCard

import finermoe_jax as fm
from finermoe_jax.model.counts import true_counts
from finermoe_jax.training.history import training_run
from finermoe_jax.weights.checkpoint import read_stored_origin
from finermoe_jax.weights.convert import Export, convert
from finermoe_jax.weights.model_card import (
    UNKNOWN,
    Origin,
    TrainingRun,
    model_card,
    read_origin,
)
from tests.support import GOLDEN, SMALL, load_preset

DENSE, MIXTURE = GOLDEN / "upcycle" / "dense_tied", GOLDEN / "e_conv_split"
MOE = fm.MoEConfig(4, 2, 1, 2, 1)
CARD = """---
license: other
license_name: small-licence
license_link: LICENSE
base_model: someone/base
language: en
---
# A model
"""


def rows(card):
    """The cells of a card's tables."""
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def test_of_a_model_alone(tmp_path):
    """Nothing is known but the architecture."""
    model = fm.load_hf(MIXTURE)
    fm.save_hf(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finermoe", "moe", "mixture-of-experts", "arxiv:2603.13364", "finermoe-jax"],
    }
    assert "licence is not known here, so none is stated" in card.text
    assert "How it was made" not in card.text and "## Training" not in card.text
    assert 'from_pretrained("path/to/this/directory", trust_remote_code=True)' in card.text
    assert "eprint = {2603.13364}" in card.text
    found, counts, moe = rows(card.text), true_counts(model.config), model.config.moe
    assert found["parameters"] == f"{counts.total:,}"
    assert found["parameters active for a token"] == f"{counts.active:,}"
    assert found["intermediate granularity G_I"] == str(moe.intermediate_granularity)
    assert found["active experts per output slot T_I"] == str(moe.active_per_group)
    assert found["experts per layer"] == str(moe.num_experts)


def test_of_a_dense_model():
    text = model_card(SMALL, Origin(("someone/base",), "mit"))
    card = ModelCard(text)
    assert card.data.base_model == "someone/base" and card.data.license == "mit"
    assert card.data.tags == ["finermoe-jax"]
    assert "trust_remote_code" not in text and "bibtex" not in text and "G_I" not in text
    assert "# Dense language model from someone/base" in text
    assert "The base model's: mit." in text


@pytest.mark.parametrize(
    ("card", "hub_id", "wanted"),
    [
        (None, None, UNKNOWN),
        (None, "me/model", Origin(("me/model",))),
        ("no front matter", None, UNKNOWN),
        ("---\n- a list\n---\n", None, UNKNOWN),
        ("---\nlicense: [\n---\n", "me/model", Origin(("me/model",))),
        ("---\nlicense: [mit, gpl]\nbase_model: 7\n---\n", None, UNKNOWN),
        ("---\nbase_model: [a/b, c/d]\n---\n", None, Origin(("a/b", "c/d"))),
        (CARD, None, Origin(("someone/base",), "other", "small-licence", "LICENSE")),
        (CARD, "me/model", Origin(("me/model",), "other", "small-licence", "LICENSE")),
    ],
)
def test_the_card_of_a_source(tmp_path, card, hub_id, wanted):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_origin(tmp_path, hub_id) == wanted


@pytest.mark.slow
def test_the_origin_comes_along(tmp_path):
    """HF → checkpoint → checkpoint → HF → HF."""
    shutil.copytree(DENSE, tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(CARD)
    named = Origin(("someone/base",), "other", "small-licence", "LICENSE")
    start = fm.UpcycleConfig(drop_ratio=0.25)

    convert(str(tmp_path / "dense"), tmp_path / "ct", "orbax", None, seed=0)
    assert read_stored_origin(tmp_path / "ct") == named
    convert(str(tmp_path / "ct"), tmp_path / "moe", "orbax", MOE, seed=0, upcycling=start)
    assert read_stored_origin(tmp_path / "moe") == dataclasses.replace(named, upcycling=start)
    convert(str(tmp_path / "moe"), tmp_path / "hf", "hf", None, seed=0, export=Export("me/x"))
    text = (tmp_path / "hf" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == "someone/base" and "upcycling" in data.tags
    assert (data.license, data.license_name, data.license_link) == (
        "other", "small-licence", "LICENSE",
    )  # fmt: skip
    assert rows(text)["upcycle.drop_ratio"] == "0.25" and 'from_pretrained("me/x"' in text
    convert(str(tmp_path / "hf"), tmp_path / "again", "hf", None, seed=0)
    assert ModelCard.load(tmp_path / "again" / "README.md").data.base_model == "someone/base"
    # A checkpoint whose origin is unknown says nothing, as checkpoints of before.
    convert(str(DENSE), tmp_path / "plain", "orbax", None, seed=0)
    assert "origin" not in json.loads((tmp_path / "plain/config/metadata").read_text())


@pytest.mark.slow
def test_of_a_run(tmp_path):
    """A workdir's card has the figures of the checkpoint's step, from the logs."""
    workdir, config = tmp_path / "run", load_preset("demo")
    convert(str(MIXTURE), workdir / "checkpoints" / "4", "orbax", None, seed=0)
    assert training_run(workdir / "checkpoints" / "4") is None  # no config.json
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    metrics = [
        {"step": step, "step_seconds": 0.5, "tokens_per_second": 100.0} for step in (2, 4, 6)
    ]
    evals = [
        {"name": "dense base", "step": 0, "loss": 3.0},
        {"name": "step 0", "step": 0, "loss": 4.25},
        {"name": "step 2", "step": 2, "loss": None},  # not finite
        {"name": "step 4", "step": 4, "loss": 3.5},
        {"name": "step 6", "step": 6, "loss": 3.25},
    ]
    for name, lines in (("metrics", metrics), ("evals", evals)):
        (workdir / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    run = training_run(workdir / "checkpoints" / "4")
    assert run == TrainingRun(config, 4, 200, {0: 4.25, 4: 3.5})
    convert(str(workdir), tmp_path / "hf", "hf", None, seed=0, export=Export(run_of=training_run))
    found = rows((tmp_path / "hf" / "README.md").read_text())
    assert found["steps"] == "4 of 150" and found["tokens, without padding"] == "200"
    assert found["held-out loss after step 0, nats per token"] == "4.2500"
    assert found["held-out loss after step 4, nats per token"] == "3.5000"
    assert found["optimizer"] == "adamw" and found["balancing"] == "sequence, weight 0.001"
    assert "1.00 to 0.00" not in found["learning rate"] and "cosine to " in found["learning rate"]

    (workdir / "metrics.jsonl").unlink()
    (workdir / "evals.jsonl").unlink()
    bare = training_run(workdir / "checkpoints" / "4")
    assert bare == TrainingRun(config, 4, None, {})
    text = model_card(fm.load_hf(MIXTURE).config, UNKNOWN, bare)
    assert "held-out" not in text and "tokens, without" not in text

    scratch = dataclasses.replace(config, init_from="", dense=SMALL)
    text = model_card(SMALL, UNKNOWN, dataclasses.replace(bare, config=scratch))
    assert "Training started from random weights." in text
