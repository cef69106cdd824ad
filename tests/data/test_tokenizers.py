"""Tokenizers and ends of text in what is made of a source: checkpoints, workdirs, exports."""

import dataclasses
import json
import shutil
from importlib.util import find_spec

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

import finermoe_jax as fm
from finermoe_jax.data.token_files import tokenizer_hash
from finermoe_jax.data.tokenizers import (
    check_kept,
    end_tokens,
    kept_files,
    open_tokenizer,
    write_files,
)
from finermoe_jax.training.initial import initial_model
from finermoe_jax.training.run import train
from finermoe_jax.training.workdir import fill_workdir
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.verify import verify
from tests.support import GOLDEN

TIED = GOLDEN / "upcycle" / "dense_tied"
MOE = fm.MoEConfig(4, 2, 1, 2, 1)
# Qwen2 takes digits one by one, GPT-2 the number as a whole.
TEXT = "ab 12 a!<|im_end|>"
TOKENS = ["<|endoftext|>", *"ab12!Ċ", "Ġ", "ab", "12", "Ġa"]
MERGES = ["a b", "1 2", "Ġ a"]


def write_pair(folder, **config):
    """vocab.json and merges.txt; tokenizer_config.json if it has anything to say."""
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_whole(folder, **config):
    """tokenizer.json, with a special token, and tokenizer_config.json."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def source(tmp_path):
    """A dense Qwen2 of 96 tokens that has no tokenizer yet."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TIED / name, folder / name)
    return folder


def templates(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool {{ messages }}")


KINDS = {
    "pair": write_pair,
    "pair, class missing": lambda f: write_pair(f, eos_token="b", model_max_length=7),
    "pair, class named": lambda f: write_pair(f, tokenizer_class="Qwen2TokenizerFast"),
    # transformers takes Qwen2's for a model of that type, whatever is named.
    "pair, class wrong": lambda f: write_pair(f, tokenizer_class="GPT2Tokenizer"),
    "pair, added tokens": lambda f: (
        write_pair(f),
        (f / "added_tokens.json").write_text(json.dumps({"<|im_end|>": len(TOKENS)})),
        (f / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}'),
    ),
    "pair, chat templates": lambda f: (write_pair(f), templates(f)),
    "whole": lambda f: write_whole(f, eos_token="b", chat_template="{{ messages }}"),
    "whole, nothing for the unknown": lambda f: (
        write_whole(f),
        Tokenizer(models.WordLevel({TEXT: 0})).save(str(f / "tokenizer.json")),
    ),
    "whole, chat templates": lambda f: (write_whole(f), templates(f)),
    "whole, code of its own": lambda f: write_whole(
        f, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_tokenizer_is_the_source_s(source, tmp_path, kind):
    KINDS[kind](source)
    (source / "mine.py").write_text("raise SystemExit('executed')")
    check_kept(source)
    kept, again = tmp_path / "kept", tmp_path / "again"
    kept.mkdir(), again.mkdir()
    write_files(kept_files(source), kept)
    write_files(kept_files(kept), again)
    assert kept_files(kept) == kept_files(again)
    assert not list(kept.glob("*.py"))
    wanted = open_tokenizer(source, 96)
    for folder in (kept, again):
        got = open_tokenizer(folder, 96)
        assert got(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
        assert got.get_vocab() == wanted.get_vocab()
        assert got.special_tokens_map == wanted.special_tokens_map
        assert got.chat_template == wanted.chat_template
        assert tokenizer_hash(folder) == tokenizer_hash(source)  # prepared data stay usable
        assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    if kind == "pair, class wrong":
        assert json.loads((kept / "tokenizer_config.json").read_text()) == {
            "tokenizer_class": "Qwen2Tokenizer"
        }


@pytest.mark.slow
def test_there_and_back(source, tmp_path):
    """The tokenizer of vocab.json and merges.txt, and the ends that config.json alone names."""
    write_pair(source)
    change_config(source, bos_token_id=1, eos_token_id=[2, 5])
    checkpoint, export, again = (tmp_path / name for name in ("checkpoint", "export", "again"))
    convert(str(source), checkpoint, "orbax", MOE, seed=0)
    convert(str(checkpoint), export, "hf", None, seed=0)
    convert(str(export), again, "orbax", None, seed=0)
    convert(str(source), tmp_path / "dense", "hf", None, seed=0)
    verify(str(source), checkpoint, "orbax", MOE, seed=0)
    verify(str(checkpoint), export, "hf", None)
    wanted = open_tokenizer(source, 96)
    places = checkpoint / "tokenizer", export, again / "tokenizer", tmp_path / "dense"
    for folder in (source, *places):
        tokenizer = open_tokenizer(folder, 96)
        assert tokenizer(TEXT)["input_ids"] == wanted(TEXT)["input_ids"], folder
        assert end_tokens(folder, tokenizer, 96) == {0, 2, 5}, folder
    for folder in places:
        generation = json.loads((folder / "generation_config.json").read_text())
        assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [2, 5])
    (checkpoint / "tokenizer" / "generation_config.json").unlink()
    (checkpoint / "checksums.json").unlink()
    description = json.loads((checkpoint / "config" / "metadata").read_text())
    del description["checksums"]  # as an early version wrote it
    (checkpoint / "config" / "metadata").write_text(json.dumps(description))
    with pytest.raises(fm.InputError, match=r"generation_config.json is missing or not what"):
        verify(str(source), checkpoint, "orbax", MOE, seed=0)


def run_of(source, tmp_path, **data):
    (tmp_path / "text.txt").write_text("ab 12 a!\n" * 4000)
    config = fm.default_config().to_dict()
    config |= dict(init_from=str(source), moe=None)
    config["data"] |= dict(path=str(tmp_path / "text.txt"), sequence_length=16, **data)
    config["data"] |= dict(global_batch_size=8, eval_fraction=0.0)
    config["train"] |= dict(steps=1, compute_dtype="float32", remat="none")
    return fm.run_config(config)


@pytest.mark.nightly  # compiles two train steps
def test_a_run_is_resumed_without_its_source(source, tmp_path):
    write_pair(source)
    change_config(source, eos_token_id=5)
    workdir, said = tmp_path / "run", []
    train(run_of(source, tmp_path), workdir, say=said.append)
    wanted = open_tokenizer(source, 96)(TEXT)["input_ids"]
    shutil.rmtree(source)
    more = run_of(source, tmp_path)
    more = dataclasses.replace(more, train=dataclasses.replace(more.train, steps=2))
    train(more, workdir, say=said.append, allow_changes=["train.steps"])
    assert any("resumed from step 1 of 2" in message for message in said)
    for folder in (workdir, workdir / "checkpoints" / "2"):
        tokenizer = open_tokenizer(folder / "tokenizer", 96)
        assert tokenizer(TEXT)["input_ids"] == wanted
        assert end_tokens(folder / "tokenizer", tokenizer, 96) == {0, 5}


@pytest.mark.parametrize(
    ("own", "stated", "ends"),
    [
        ({}, None, {0, 5}),  # the tokenizer's directory is silent
        (dict(eos_token_id=7), None, {0, 7}),
        ({}, "same", {0, 5}),
        ({}, "other", {0}),  # ids of another tokenizer mean nothing
    ],
)
def test_ends_of_the_source_beside_another_tokenizer_directory(source, tmp_path, own, stated, ends):
    change_config(source, eos_token_id=5)
    (tmp_path / "files").mkdir()
    write_pair(tmp_path / "files", tokenizer_class="Qwen2Tokenizer")
    if own:
        (tmp_path / "files" / "generation_config.json").write_text(json.dumps(own))
    if stated:
        write_pair(source)
    if stated == "other":
        (source / "merges.txt").write_text("#version: 0.2\na b\n")
    config = run_of(source, tmp_path, tokenizer=str(tmp_path / "files"))
    start = initial_model(config)
    (tmp_path / "run").mkdir()
    fill_workdir(tmp_path / "run", config, start.tokenizer_files, start.ends_files)
    kept = tmp_path / "run" / "tokenizer"
    assert end_tokens(kept, open_tokenizer(kept, 96), 96) == ends


@pytest.mark.parametrize(
    ("config", "generation", "kept"),
    [
        (dict(eos_token_id=4), None, dict(eos_token_id=4)),
        (dict(eos_token_id=[4], pad_token_id=0), None, dict(eos_token_id=[4], pad_token_id=0)),
        (dict(eos_token_id=4), dict(eos_token_id=[5, 6]), dict(eos_token_id=[5, 6])),
        (dict(eos_token_id=4), dict(eos_token_id=None, top_k=3), dict(eos_token_id=4, top_k=3)),
        (dict(bos_token_id=1), dict(eos_token_id=5), dict(bos_token_id=1, eos_token_id=5)),
        (dict(text_config=dict(eos_token_id=4)), None, dict(eos_token_id=4)),
        (dict(eos_token_id=None, text_config=dict(eos_token_id=4)), None, dict(eos_token_id=4)),
        (dict(eos_token_id=3, text_config=dict(eos_token_id=4, bos_token_id=2)), None,
         dict(eos_token_id=3, bos_token_id=2)),
        (dict(decoder=dict(eos_token_id=3), text_config=dict(eos_token_id=4)), None,
         dict(eos_token_id=3)),
        (dict(), None, None),
    ],
)  # fmt: skip
def test_ends_of_text_that_config_json_names(tmp_path, config, generation, kept):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = kept_files(tmp_path).get("generation_config.json")
    assert (None if found is None else json.loads(found)) == kept


def test_transformers_reads_nested_configs_alike():
    from transformers import GenerationConfig

    config = dict(eos_token_id=3, text_config=dict(eos_token_id=4, bos_token_id=2))
    theirs = GenerationConfig.from_model_config(dict(config))
    assert (theirs.eos_token_id, theirs.bos_token_id) == (3, 2)
    theirs = GenerationConfig.from_model_config(
        dict(decoder=dict(eos_token_id=3), text_config=dict(eos_token_id=4))
    )
    assert theirs.eos_token_id == 3


def with_versions(folder):
    """Another vocabulary for this version of transformers than for others."""
    write_whole(folder, fast_tokenizer_files=["tokenizer.4.0.0.json", "tokenizer.json"])
    other = json.loads((folder / "tokenizer.json").read_text())
    other["model"]["vocab"] |= {"a": 2, "b": 1}
    (folder / "tokenizer.4.0.0.json").write_text(json.dumps(other))


def with_code(folder):
    write_pair(folder, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "mine.py").write_text("raise SystemExit('executed')")


REFUSED = {
    "versions": (with_versions, "would behave differently when copied"),
    "code": (with_code, "cannot be read"),
    "damaged": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
    "no merges": (lambda f: (f / "vocab.json").write_text("{"), "cannot be read"),
    "ids": (lambda f: change_config(f, eos_token_id="w7"), "eos_token_id='w7' must be an integer"),
    "sentencepiece": (
        lambda f: (f / "tokenizer.model").write_bytes(b"\n\x03"),
        "sentencepiece" if find_spec("sentencepiece") is None else "cannot be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(source, tmp_path, case):
    write, words = REFUSED[case]
    write(source)
    with pytest.raises(fm.InputError, match=words):
        convert(str(source), tmp_path / "out", "orbax", MOE, seed=0)
    with pytest.raises(fm.InputError, match=words):
        convert(str(source), tmp_path / "out", "hf", None, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    if case != "ids":
        config = run_of(source, tmp_path)
        with pytest.raises(fm.InputError, match=words):
            train(config, tmp_path / "run", say=lambda _: None)
        assert not (tmp_path / "run").exists()
    model = fm.upcycle_model(fm.load_hf(TIED), MOE, jax.random.key(0))
    for save in (fm.save_checkpoint, fm.save_hf):
        with pytest.raises(fm.InputError, match=words):
            save(model, tmp_path / "out", tokenizer=source)
        assert not (tmp_path / "out").exists()


def test_code_of_a_tokenizer_is_not_run(source, monkeypatch):
    with_code(source)
    change_config(source, model_type="llama")
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked"))
    with pytest.raises(fm.InputError, match=r"cannot be read: .*custom code"):
        check_kept(source)


def test_an_export_of_another_model_type(source):
    """Its config.json could make transformers load another class."""
    write_pair(source, tokenizer_class="GPT2Tokenizer")
    change_config(source, model_type="llama")
    check_kept(source, {"config.json": '{"model_type": "llama"}'})
    with pytest.raises(fm.InputError, match="would behave differently"):
        check_kept(source, {"config.json": '{"model_type": "qwen2"}'})
