"""Whatever a user gets wrong: one clear message, exit code 2, and nothing left behind."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import finermoe_jax as fm
from finermoe_jax.config.parse import run_config
from finermoe_jax.data.text import TextFile
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.evaluation.evaluate import evaluate
from finermoe_jax.training.run import train
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.integrity import write_checksums
from tests.support import GOLDEN, ROOT, assert_refused, command, processes

TIED, MIXTURE = GOLDEN / "upcycle" / "dense_tied", GOLDEN / "e_conv_split"
SMALL_MOE = fm.MoEConfig(4, 2, 1, 2, 1)
WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small dense source, with a tokenizer of one token per word; not to be written to."""
    folder = shutil.copytree(TIED, tmp_path_factory.mktemp("dense") / "source")
    (folder / "golden.safetensors").unlink()
    write_tokenizer(folder, WORDS)
    (folder / "generation_config.json").write_text('{"eos_token_id": [95, 7], "top_p": 0.8}')
    return folder


def write_tokenizer(folder, words):
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def text_file(folder, words=20_000):
    path = folder / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(WORDS, words)) + "\n")
    return path


def values(source, text, **changes):
    """A run's config as a nested mapping; changes are dotted paths with __ for the dot."""
    config = fm.default_config().to_dict()
    config["init_from"] = str(source)
    config["moe"] = dataclasses.asdict(SMALL_MOE)
    config["data"] |= dict(path=str(text), sequence_length=16, global_batch_size=8)
    config["train"] |= dict(steps=2, compute_dtype="float32", remat="none")
    for path, value in changes.items():
        *groups, field = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target[field] = value
    return config


def snapshot(folder):
    """Every path below a folder, with what it holds."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def refuses(words, action, *arguments, **settings):
    """The action ends with one InputError that holds all words."""
    with pytest.raises(fm.InputError) as error:
        action(*arguments, **settings)
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message
    return message


# --- converting -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(intermediate_granularity=3), ["intermediate_size=40", "3", "the remainder is 1"]),
        (dict(intermediate_granularity=64), ["intermediate_size=40", "64"]),
        (dict(intermediate_granularity=4, output_granularity=5), ["hidden_size=24", "5"]),
        (dict(intermediate_granularity=4, shared_expert_intermediate_size=20), ["=20", "40"]),
        (
            dict(intermediate_granularity=4, mlp_only_layers=(7,)),
            ["mlp_only_layers contains 7", "=2"],
        ),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_sizes_that_do_not_divide(dense, tmp_path, settings, words, exists):
    target = tmp_path / "target"
    if exists:
        target.mkdir()
    before = snapshot(tmp_path)
    moe = fm.MoEConfig(**settings)
    refuses(words, convert, str(dense), target, "orbax", moe, seed=0)
    assert snapshot(tmp_path) == before


def damaged(kind, folder):
    """A source with one thing wrong, and words of the message."""
    shutil.copytree(TIED, folder)
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors, architecture = load_file(path), json.loads(config.read_text())
    norm = "model.layers.1.input_layernorm.weight"
    if kind == "missing tensor":
        del tensors[norm]
        save_file(tensors, path)
        return ["1 missing", norm]
    if kind == "extra tensor":
        save_file(tensors | {"extra.weight": tensors[norm]}, path)
        return ["1 unexpected", "extra.weight"]
    if kind == "wrong shape":
        save_file(tensors | {norm: tensors[norm][:5]}, path)
        return [norm, "(5,)", "(24,)"]
    if kind == "integers":
        save_file(tensors | {norm: tensors[norm].astype(np.int32)}, path)
        return [norm, "I32"]
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return ["model.safetensors", "truncated"]
    if kind == "no weights":
        path.unlink()
        return ["neither model.safetensors"]
    if kind == "index outside":
        path.rename(folder.parent / "outside.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return ["outside its directory", "../outside.safetensors"]
    if kind == "no config":
        config.unlink()
        return ["config.json is missing"]
    if kind == "gemma":
        config.write_text(json.dumps(architecture | {"model_type": "gemma"}))
        return ["model_type='gemma'"]
    assert kind == "rope_scaling"
    config.write_text(json.dumps(architecture | {"rope_scaling": {"type": "dynamic"}}))
    return ["rope_scaling"]


@pytest.mark.parametrize("moe", [SMALL_MOE, None], ids=["upcycled", "as it is"])
@pytest.mark.parametrize(
    "kind",
    ["missing tensor", "extra tensor", "wrong shape", "integers", "truncated", "no weights",
     "index outside", "no config", "gemma", "rope_scaling"],
)  # fmt: skip
def test_damaged_sources(tmp_path, kind, moe):
    words = damaged(kind, tmp_path / "source")
    before = snapshot(tmp_path)
    refuses(words, convert, str(tmp_path / "source"), tmp_path / "out", "orbax", moe, seed=0)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize(("name", "words"), [("full", "not empty"), ("file", "is a file")])
def test_occupied_targets(dense, tmp_path, to, name, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    refuses([words, name], convert, str(dense), tmp_path / name, to, SMALL_MOE, seed=0)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("source", ["nobody/not-cached", "{tmp}/nowhere"])
def test_sources_that_are_nowhere(tmp_path, to, source):
    source = source.format(tmp=tmp_path)
    refuses([source], convert, source, tmp_path / "out", to, SMALL_MOE, seed=0)
    assert snapshot(tmp_path) == {}


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    (tmp_path / "source").mkdir()
    before = snapshot(tmp_path)
    refuses(
        ["source", "neither a checkpoint"],
        convert, str(tmp_path / "source"), tmp_path / "out", "hf", None, seed=0,
    )  # fmt: skip
    assert snapshot(tmp_path) == before


def test_variants_without_a_published_form_are_not_exported(dense, tmp_path):
    moe = dataclasses.replace(SMALL_MOE, separate_routers=True)
    convert(str(dense), tmp_path / "checkpoint", "orbax", moe, seed=0)
    before = snapshot(tmp_path)
    refuses(
        ["separate_routers=True"],
        convert, str(tmp_path / "checkpoint"), tmp_path / "out", "hf", None, seed=0,
    )  # fmt: skip
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("part", ["params", "tokenizer"])
def test_checkpoints_with_an_emptied_part(dense, tmp_path, part):
    """Weights lost: refused. The tokenizer lost: nothing of the model is."""
    convert(str(dense), tmp_path / "checkpoint", "orbax", SMALL_MOE, seed=0)
    path = tmp_path / "checkpoint" / part
    for file in [p for p in path.rglob("*") if p.is_file()]:
        file.unlink()
    before = snapshot(tmp_path)
    if part == "tokenizer":
        fm.load_checkpoint(tmp_path / "checkpoint")
        refuses(["no tokenizer"], open_tokenizer, path, 96)
    else:
        refuses(["checkpoint", "damaged"], fm.load_checkpoint, tmp_path / "checkpoint")
    assert snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "{", ["not readable as JSON"]),
        (lambda text: "[]", ["not a JSON object"]),
        (lambda text: "{}", ["model lacks", "vocab_size"]),
        (lambda text: text.replace('"dtype"', '"dytpe"'), ["dtype"]),
        (lambda text: text.replace('"moe"', '"meo"'), ["no field 'meo'", "moe"]),
        (lambda text: text.replace('"hidden_size": 24', '"hidden_size": 48'), ["checkpoint"]),
    ],
    ids=["cut", "list", "empty", "no dtype", "unknown field", "another size"],
)
def test_checkpoints_with_a_damaged_description(dense, tmp_path, change, words):
    convert(str(dense), tmp_path / "checkpoint", "orbax", SMALL_MOE, seed=0)
    path = tmp_path / "checkpoint" / "config" / "metadata"
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    write_checksums(tmp_path / "checkpoint")  # as whoever wrote it so would have
    refuses(words, fm.load_checkpoint, tmp_path / "checkpoint")


def same_weights(got, wanted):
    got, wanted = (nnx.to_pure_dict(nnx.state(model)) for model in (got, wanted))
    return jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), got, wanted)
    )


@pytest.mark.slow
def test_there_and_back(dense, tmp_path):
    (tmp_path / "checkpoint").mkdir()  # empty directories are welcome
    convert(str(dense), tmp_path / "checkpoint", "orbax", SMALL_MOE, seed=3)
    convert(str(tmp_path / "checkpoint"), tmp_path / "hf", "hf", None, seed=0)
    convert(str(tmp_path / "hf"), tmp_path / "again", "orbax", SMALL_MOE, seed=4)
    models = [fm.load_checkpoint(tmp_path / n) for n in ("checkpoint", "again")]
    models.append(fm.load_hf(tmp_path / "hf"))
    models.append(fm.upcycle_model(fm.load_hf(dense), SMALL_MOE, jax.random.key(3)))
    assert all(same_weights(model, models[0]) for model in models[1:])
    original = (dense / "tokenizer.json").read_bytes()
    places = ["hf", "checkpoint/tokenizer", "again/tokenizer"]
    assert all((tmp_path / p / "tokenizer.json").read_bytes() == original for p in places)
    for folder in (dense, *(tmp_path / p for p in places)):
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [95, 7], "top_p": 0.8}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [95, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "checkpoint", "hf"]


def test_a_dense_import_stays_tied(dense, tmp_path):
    convert(str(dense), tmp_path / "checkpoint", "orbax", None, seed=0)
    model = fm.load_checkpoint(tmp_path / "checkpoint")
    assert model.config.tie_word_embeddings and model.config.moe is None
    assert same_weights(model, fm.load_hf(dense))


@pytest.mark.slow
def test_a_mixture_is_imported_as_it_is(tmp_path):
    convert(str(MIXTURE), tmp_path / "checkpoint", "orbax", SMALL_MOE, seed=0)
    model = fm.load_checkpoint(tmp_path / "checkpoint")
    assert model.config.moe.active_per_group == 2
    assert same_weights(model, fm.load_hf(MIXTURE))


# --- configs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(trian={}), ["no field 'trian'", "Did you mean train"]),
        (dict(moe__active_per_grup=2), ["no field 'active_per_grup'", "active_per_group"]),
        (dict(data__sequence_len=2), ["no field 'sequence_len'", "sequence_length"]),
        (dict(optimizer__lr=1.0), ["config.optimizer", "no field 'lr'", "learning_rate"]),
        (dict(train__steps="10"), ["config.train.steps='10'", "int"]),
        (dict(train__steps=1.5), ["config.train.steps=1.5", "int"]),
        (dict(train__seed=None), ["config.train.seed=None", "int"]),
        (dict(train__kernel="triton"), ["config.train.kernel='triton'", "auto", "tpu"]),
        (dict(optimizer__clip_norm="1"), ["config.optimizer.clip_norm='1'", "a number"]),
        (dict(moe__plain_top_k=1), ["config.moe.plain_top_k=1", "true or false"]),
        (dict(moe__concat_proj=True), ["config.moe.concat_proj=True", "'none', 'routed', 'all'"]),
        (dict(train__param_dtype="float16"), ["'float16'", "'float32', 'bfloat16'"]),
        (dict(moe__mlp_only_layers=1), ["config.moe.mlp_only_layers=1", "list"]),
        (dict(moe__mlp_only_layers=["a"]), ["config.moe.mlp_only_layers='a'", "int"]),
        (dict(prompts="text"), ["config.prompts='text'", "list"]),
        (dict(moe=32), ["config.moe=32", "group of fields"]),
        (dict(dense={"hidden_size": 4}), ["config.dense lacks", "vocab_size"]),
        (dict(moe__output_expansion=0), ["output_expansion=0", "at least 1"]),
        (dict(moe__intermediate_expansion=0), ["intermediate_expansion=0", "at least 1"]),
        (dict(moe__active_per_group=5), ["active_per_group=5", "4 experts"]),
        (dict(train__steps=0), ["train.steps=0"]),
        (dict(data__eval_fraction=-0.1), ["data.eval_fraction=-0.1"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_values(changes, words):
    refuses(words, run_config, values("source", "text.txt", **changes))


def test_the_unchanged_values_are_accepted():
    assert run_config(values("source", "text.txt")).moe == SMALL_MOE


# --- training -------------------------------------------------------------------------------


def refuses_training(words, tmp_path, dense, text, **changes):
    """train ends with one InputError before anything is written."""
    before = snapshot(tmp_path)
    config = run_config(values(dense, text, **changes))
    refuses(words, train, config, tmp_path / "run", say=lambda _: None)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["a.txt", "contains no text"]),
        ("a.txt", b"w1 w2 w3\n", ["a.txt", "training windows of 16", "global_batch_size=8"]),
        ("a.txt", b"w1 \xe4\xf6\xfc w2\n", ["a.txt", "not UTF-8"]),
        ("a.jsonl", b'{"text": "w1"}\n{"content": "w2"}\n', ["a.jsonl, line 2", '"text"']),
        ("a.jsonl", b'{"text": 3}\n', ["a.jsonl, line 1", '"text"']),
        ("a.jsonl", b"w1 w2\n", ["a.jsonl, line 1"]),
        ("a.csv", b"w1,w2\n", [".txt or .jsonl"]),
        (None, b"", ["missing.txt", "does not exist"]),
    ],
)
def test_bad_text(dense, tmp_path, name, content, words):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    refuses_training(words, tmp_path, dense, path)
    if "training windows" not in str(words):
        refuses(words, evaluate, str(dense), text=path)


def test_line_separators_inside_json_strings(tmp_path):
    """A JSON-lines file has one object between line feeds; other separators belong to the text."""
    texts = ["a\u2028b", "c\x85d", "e\x1cf", "g\u2029h\r\ni"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    assert [piece.text for piece in TextFile(tmp_path / "a.jsonl").pieces()] == texts


def test_text_shorter_than_its_held_out_window(dense, tmp_path):
    words = ["held-out", "less than one window of 16"]
    refuses_training(words, tmp_path, dense, text_file(tmp_path, 260))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(init_from="nobody/not-cached"), ["nobody/not-cached", "Hub download failed"]),
        (dict(init_from="no such thing"), ["no such thing"]),
        (dict(data__path=""), ["data.path"]),
        (dict(data__sequence_length=129), ["sequence_length=129", "128"]),
        (dict(data__global_batch_size=12), ["12", "8 devices"]),
        (dict(mesh__tensor=3), ["mesh", "8 devices"]),
        (dict(mesh__data=0), ["mesh"]),
        (dict(moe__intermediate_granularity=7), ["intermediate_size=40", "7"]),
        (dict(moe__output_granularity=5), ["hidden_size=24", "5"]),
        (dict(data__tokenizer="{tmp}"), ["no tokenizer"]),
        (dict(data__tokenizer="demo/model"), ["2048 tokens", "vocab_size is 96"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_that_cannot_begin(dense, tmp_path, changes, words):
    changes = {k: str(tmp_path) if v == "{tmp}" else v for k, v in changes.items()}
    refuses_training(words, tmp_path, dense, text_file(tmp_path), **changes)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    write_tokenizer(tmp_path, [f"w{i}" for i in range(96)])
    refuses(["97 tokens", "vocab_size is 96"], open_tokenizer, tmp_path, 96)
    write_tokenizer(tmp_path, [f"w{i}" for i in range(95)])
    assert len(open_tokenizer(tmp_path, 96)) == 96


def test_a_tokenizer_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("not a tokenizer")
    refuses(["tokenizer", "cannot be read"], open_tokenizer, tmp_path, 96)


def test_a_source_without_a_tokenizer(tmp_path):
    words = ["no tokenizer", "data.tokenizer"]
    refuses_training(words, tmp_path, TIED, text_file(tmp_path))


def test_stated_sizes_that_are_not_the_sources(dense, tmp_path):
    stated = dataclasses.asdict(fm.load_hf(dense).config) | {"vocab_size": 97, "rope_theta": 1e4}
    refuses_training(
        ["vocab_size: 96 there, 97", "rope_theta: 1000000.0 there, 10000.0"],
        tmp_path, dense, text_file(tmp_path), model=stated,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", ["tpu", "gpu"])
def test_a_kernel_of_another_platform(dense, tmp_path, kernel):
    refuses_training(
        [f"train.kernel='{kernel}'", "are cpu", 'train.kernel="auto"'],
        tmp_path, dense, text_file(tmp_path), train__kernel=kernel,
    )  # fmt: skip


def test_a_mixture_with_other_granularities(tmp_path):
    write_tokenizer(tmp_path, WORDS)
    refuses_training(
        ["has experts", "moe.active_per_group: 2 there, 1", "output_granularity: 1 there, 2"],
        tmp_path, MIXTURE, text_file(tmp_path), data__tokenizer=str(tmp_path),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["foreign", "file", "other config", "damaged config"])
def test_workdirs_of_others(dense, tmp_path, kind):
    config = run_config(values(dense, text_file(tmp_path)))
    workdir = tmp_path / "run"
    words = ["run"]
    if kind == "file":
        workdir.write_text("mine")
        words += ["is a file"]
    else:
        workdir.mkdir()
    if kind == "foreign":
        (workdir / "thesis.tex").write_text("years of work")
        words += ["not empty"]
    if kind in ("other config", "damaged config"):
        (workdir / "checkpoints" / "damaged-1").mkdir(parents=True)  # it had one
        stored = dataclasses.asdict(dataclasses.replace(config, prompt_tokens=7))
        content = json.dumps(stored) if kind == "other config" else '{"train": '
        (workdir / "config.json").write_text(content)
        words += ["prompt_tokens: 7 in the run, 48"] if kind == "other config" else ["JSON"]
    before = snapshot(tmp_path)
    refuses(words, train, config, workdir, say=lambda _: None)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("length", "stride", "words"),
    [(129, 0, ["129", "128"]), (-1, 0, ["-1"]), (16, 17, ["--stride=17", "16"]), (0, -1, ["-1"])],
)
def test_windows_that_cannot_be_scored(dense, tmp_path, length, stride, words):
    text, windows = text_file(tmp_path, 20), dict(sequence_length=length, stride=stride)
    refuses(words, evaluate, str(dense), text=text, **windows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(input_ids=np.zeros((1, 0), int)), ["(1, 0)"]),
        (dict(input_ids=np.zeros(3, int)), ["(3,)"]),
        (dict(input_ids=np.array([[96]])), ["96"]),
        (dict(input_ids=np.array([[-1]])), ["-1", "0 … 95"]),
        (dict(attention_mask=np.ones((1, 2))), ["(1, 2)", "(1, 3)"]),
        (dict(attention_mask=np.zeros((1, 3))), ["attention_mask"]),
        (dict(max_new_tokens=0), ["max_new_tokens=0"]),
        (dict(max_new_tokens=126), ["3", "126", "128"]),
        (dict(temperature=-1.0), ["temperature=-1.0"]),
        (dict(temperature=float("nan")), ["temperature=nan"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_prompts_that_cannot_be_continued(dense, changes, words):
    refuses(words, fm.generate, fm.load_hf(dense), **{"input_ids": np.zeros((1, 3), int)} | changes)


# --- commands ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/demoo.py"], ["configs/demoo.py", "configs/demo.py"]),
        (["--config=configs/demo.py:cx"], ["unknown variant 'cx'", "ct"]),
        (["--config=configs/demo.py", "--config.train.stepps=3"], ["'stepps'", "'steps'"]),
        (["--config.train.stepps=3"], ["'stepps'", "'steps'"]),
        (["--config=configs/demo.py", "--config.train.steps=many"], ["steps", "many"]),
        (["--workdri={tmp}/run"], ["workdri", "workdir"]),
        (["--profile_steps=5:3"], ["--profile_steps='5:3'", "20:22"]),
    ],
)
def test_mistyped_flags(tmp_path, arguments, words):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = command("train", f"--workdir={tmp_path}/run", *arguments)
    assert_refused(result, *words)
    assert "\\'" not in result.stderr, "quoted twice"
    assert snapshot(tmp_path) == {}


def test_the_default_config_from_another_directory(tmp_path):
    """Found, or said to be missing; never a traceback."""
    result = command("train", "--print_config", cwd=tmp_path)
    if result.returncode:
        assert_refused(result, "configs/demo.py")
    else:
        assert json.loads(result.stdout)["init_from"] == "demo/model"


def test_convert_command(dense, tmp_path):
    # The published granularities, 32 slices, do not divide the width of 40.
    refused = command("convert", f"--source={dense}", "--target=out", cwd=tmp_path)
    assert_refused(refused, "intermediate_size=40", "32")
    assert snapshot(tmp_path) == {}
    done = command("convert", f"--source={MIXTURE}", f"--target={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert same_weights(fm.load_checkpoint(tmp_path / "out"), fm.load_hf(MIXTURE))


def test_eval_and_generate_commands(dense, tmp_path):
    text = text_file(tmp_path, 1)
    text.write_bytes(b"w1 \xff\n")
    result = command("eval", f"--checkpoint={dense}", f"--text={text}", "--output=o.json",
                     cwd=tmp_path)  # fmt: skip
    assert_refused(result, "text.txt", "not UTF-8")
    result = command("generate", f"--checkpoint={tmp_path}", "--prompt=w1", cwd=tmp_path)
    assert_refused(result, str(tmp_path), "neither a checkpoint")
    assert list(snapshot(tmp_path)) == ["text.txt"]


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_checkpoints_with_damaged_weights(dense, tmp_path, damage):
    convert(str(dense), tmp_path / "checkpoint", "orbax", SMALL_MOE, seed=0)
    files = [p for p in (tmp_path / "checkpoint" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "cut":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        largest.unlink()
    result = command("generate", f"--checkpoint={tmp_path / 'checkpoint'}", "--prompt=w1")
    assert_refused(result, str(tmp_path / "checkpoint"), "is damaged", largest.name)


@pytest.mark.nightly
@pytest.mark.parametrize("script", ["train.py", "convert_hf.py", "eval.py", "generate.py"])
def test_help(script):
    result = processes.run([sys.executable, str(ROOT / script), "--help"])
    assert result.returncode == 0 and result.stderr == ""
    wanted = {
        "train.py": [
            "--config",
            "--workdir",
            "--print_config",
            "--tensorboard",
            "--wandb",
            "--profile_steps",
            "--peak_tflops",
        ],
        "convert_hf.py": ["--source", "--target", "--to", "--config"],
        "eval.py": ["--checkpoint", "--text", "--tasks", "--data_dir", "--limit", "--output"],
        "generate.py": ["--checkpoint", "--prompt", "--max_new_tokens", "--temperature"],
    }[script]
    assert [flag for flag in wanted if flag not in result.stdout] == []
