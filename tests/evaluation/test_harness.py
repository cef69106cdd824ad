"""The evaluation harness on our models: requests, tasks with local rows, what is refused."""

import functools
import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

import finermoe_jax as fm
from finermoe_jax.data.tokenizers import open_tokenizer
from finermoe_jax.errors import InputError
from finermoe_jax.evaluation.code_execution import CodeEval, passes
from finermoe_jax.evaluation.evaluate import Tasks, evaluate
from finermoe_jax.evaluation.harness import HarnessModel
from finermoe_jax.evaluation.scoring import Continuation, score, windows
from finermoe_jax.evaluation.tasks import TEN, select
from finermoe_jax.generation.sampling import Sampling
from tests.support import ROOT, assert_refused, command

DEMO = ROOT / "finermoe_jax" / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(DEMO, 2048)


@pytest.fixture(scope="module")
def harness(tokenizer):
    return HarnessModel(fm.load_hf(DEMO), tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _the_harness_reads_its_tasks_once():
    """Thousands of files for all of them, hundreds for the ten benchmarks."""
    read = functools.cache(
        lambda paths, defaults: TaskManager(include_path=list(paths), include_defaults=defaults)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "finermoe_jax.evaluation.tasks.TaskManager",
            lambda include_path=(), include_defaults=True: read(
                tuple(include_path), include_defaults
            ),
        )
        yield


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


CHOICES = dict(text=["a list", "the module", "print it out", "7"], label=["A", "B", "C", "D"])
ARC = [
    dict(id="1", question="What does the function return?", choices=CHOICES, answerKey="A"),
    dict(id="2", question="Which object is imported first?", choices=CHOICES, answerKey="B"),
    dict(id="3", question="How many are they?", choices=CHOICES, answerKey="D"),
]
MBPP = dict(
    task_id=1, text="Add two numbers.", code="", test_setup_code="", challenge_test_list=[],
    test_list=["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Invented rows in the layout of docs/evaluation.md."""
    folder = tmp_path_factory.mktemp("rows")
    question = dict(question="Which is it?", choices=["one", "two", "three", "four"])
    ending = dict(activity_label="Programming", ctx_a="A man opens a file.", ctx_b="he", ind=1)
    for path, of_path in {
        "arc_easy/test.jsonl.gz": ARC,
        "hellaswag/validation.jsonl": [ending | dict(endings=["reads.", "is."] * 2, label="2")] * 2,
        "hellaswag/train.jsonl": [ending | dict(endings=["reads.", "is."] * 2, label="2")] * 2,
        "winogrande/validation.jsonl.gz": [
            dict(sentence="A set is a list but _ is sorted.", option1="the set", option2="the list",
                 answer="2")
        ],
        "mmlu/test.jsonl.gz": [
            dict(subject=name, answer=2) | question for name in ("anatomy", "anatomy", "virology")
        ],
        "agieval/math.jsonl": [dict(query="Q: What is the sum?\nA:", answer="3")],
        "gsm8k/test.jsonl": [dict(question="How many?", answer="#### 3")],
        "mbpp/test.jsonl.gz": [MBPP],
        "bbh/snarks.jsonl.gz": [dict(input="Which?", target="(A)")],
        "arc_challenge/test.jsonl": [dict(question="No choices here?")],
    }.items():  # fmt: skip
        _write(folder / path, of_path)
    return folder


# --- requests -------------------------------------------------------------------------------


def _request(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def _log_p(model, ids):
    """log p [T, V] of what follows each token."""
    return np.asarray(jax.nn.log_softmax(model(np.asarray([ids])).logits[0]), np.float64)


@pytest.mark.slow
def test_loglikelihood(harness, tokenizer):
    pairs = [("The function returns", " a list"), ("", "import sys"), ("Trailing  ", "space")]
    found = harness.loglikelihood([_request("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        begin = len(tokenizer.encode(context.rstrip()))
        ids = [*([] if context else [tokenizer.eos_token_id]), *whole]
        begin += not context
        log_p = _log_p(harness.model, ids)[begin - 1 : -1]
        targets = np.asarray(ids[begin:])
        assert total == pytest.approx(log_p[np.arange(len(targets)), targets].sum(), abs=1e-4)
        assert greedy == (log_p.argmax(-1) == targets).all()


@pytest.mark.slow
def test_rolling_is_the_texts_log_likelihood(harness, tokenizer):
    text = "The with statement is used to wrap the execution of a block.\n" * 3
    (found,) = harness.loglikelihood_rolling([_request("loglikelihood_rolling", text)])
    ids = tokenizer.encode(text, add_special_tokens=False)
    log_p = _log_p(harness.model, [tokenizer.eos_token_id, *ids])
    assert found == pytest.approx(log_p[np.arange(len(ids)), ids].sum(), abs=1e-3)


@pytest.mark.parametrize("count", [1, 8, 9, 30])
@pytest.mark.parametrize("stride", [8, 3])
def test_windows_are_the_harnesss(count, stride):
    tokens = list(range(count))
    ours = windows(tokens, 99, 8, stride)
    theirs = get_rolling_token_windows(tokens, 99, max_seq_len=8, context_len=8 - stride + 1)
    for (context, targets), (inputs, predicted) in zip(ours, theirs, strict=True):
        assert targets == predicted
        # Its first windows hold less; its later ones begin with the token that falls out of ours.
        assert [*context, *targets][:-1] == inputs


def test_weights_that_are_not_numbers(harness):
    graphdef, state = nnx.split(harness.model)
    damaged = nnx.merge(graphdef, jax.tree.map(lambda x: x * np.nan, state))
    with pytest.raises(InputError, match="log-likelihoods are not finite: its weights"):
        score(damaged, [Continuation([1, 2], [3])])


@pytest.mark.nightly
def test_generate_until(harness, tokenizer, capsys):
    prompt, settings = "The following example shows", dict(do_sample=False, max_gen_toks=12)
    ids = np.asarray([tokenizer.encode(prompt)])
    whole = tokenizer.decode(np.asarray(fm.generate(harness.model, ids, None, 12))[0, ids.size :])
    stop = whole[9:12]
    requests = [
        _request("generate_until", prompt, settings | dict(until=[])),
        _request("generate_until", prompt, settings | dict(until=[stop])),
        _request("generate_until", "word " * 2000, settings | dict(until=[])),
    ]
    before = harness.cut
    free, stopped, cut = harness.generate_until(requests)
    assert "1 of 2 prompts exceed 1012 tokens (1024 minus 12 to" in capsys.readouterr().err
    assert harness.cut == before + 1
    assert free == whole and stopped == whole[: whole.index(stop)]
    assert harness.generate_until(requests) == [free, stopped, cut]
    # A penalty holds for greedy decoding, too; settings that say nothing change nothing.
    penalty = dict(until=[], repetition_penalty=1e9, top_k=None, temperature=0.3)
    (other,) = harness.generate_until([_request("generate_until", prompt, settings | penalty)])
    never = Sampling(repetition_penalty=1e9)
    made = np.asarray(fm.generate(harness.model, ids, None, 12, sampling=never))[0, ids.size :]
    assert other == tokenizer.decode(made) != whole
    with pytest.raises(InputError, match=r"max_gen_toks=1024 .* 1024 tokens"):
        harness.generate_until([_request("generate_until", prompt, dict(max_gen_toks=1024))])


@pytest.mark.slow
def test_long_prompts_lose_their_beginning(harness, capsys):
    words = " ".join(["word"] * 2000)
    requests = [_request("loglikelihood", words, " end"), _request("loglikelihood", "a", " end")]
    (total, _), _ = harness.loglikelihood(requests)
    assert "1 of 2 prompts exceed the model's context of 1024" in capsys.readouterr().err
    context, targets = harness._encode_pair(words, " end")
    kept = context[-(1024 - len(targets) + 1) :]
    (wanted,) = score(harness.model, [Continuation(kept, targets)])
    assert total == wanted.log_likelihood


def test_chat_template(harness, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        said = [dict(role="user", content="Hi")]
        assert harness.apply_chat_template(said) == "[user]Hi[assistant]"
        assert harness.chat_template(True) == tokenizer.chat_template
        answered = [*said, dict(role="assistant", content="The answer")]
        text = harness.apply_chat_template(answered, add_generation_prompt=False)
        assert text == "[user]Hi[assistant]The answer"
    finally:
        tokenizer.chat_template = None
    assert "demo" in harness.tokenizer_name


# --- tasks ----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_ten_benchmarks_with_local_rows(rows, harness, tmp_path):
    """All that has rows, over all devices; the mean is of those."""
    chosen = {"mmlu", "hellaswag", "winogrande", "arc_easy", "agieval"}
    here = tmp_path / "rows"
    for name in chosen:
        (here / name).mkdir(parents=True)
        for file in (rows / name).iterdir():
            (here / name / file.name).write_bytes(file.read_bytes())
    tasks = Tasks(["finermoe"], here, skip_missing=True, allow_code_execution=True)
    result = evaluate(str(DEMO), tasks=tasks, show_progress=False)
    scores = result["tasks"]
    assert {name for name in TEN if name in scores} == chosen
    assert "agieval_logiqa_en" in result["skipped"] and "mbpp" in result["skipped"]
    values = [scores[name][TEN[name]] for name in chosen]
    assert scores["finermoe"] == {"mean": pytest.approx(np.mean(values)), "benchmarks": 5}
    subjects = [scores["mmlu_anatomy"], scores["mmlu_virology"]]
    assert [one["rows"] for one in subjects] == [2, 1]
    assert result["cut"] == 0
    weighted = (2 * subjects[0]["acc"] + subjects[1]["acc"]) / 3
    assert scores["mmlu"]["acc"] == pytest.approx(weighted)
    # The choice of the harness, from log-likelihoods of one device.
    right = 0
    for row in ARC:
        prompt = f"Question: {row['question']}\nAnswer:"
        pairs = [_request("loglikelihood", prompt, f" {text}") for text in CHOICES["text"]]
        chosen_one = np.argmax([total for total, _ in harness.loglikelihood(pairs)])
        right += "ABCD"[chosen_one] == row["answerKey"]
    assert scores["arc_easy"]["acc"] == pytest.approx(right / 3) and scores["arc_easy"]["rows"] == 3
    again = Tasks(["arc_easy", "agieval_math"], here, limit=2)
    first, second = (evaluate(str(DEMO), tasks=again, show_progress=False) for _ in range(2))
    assert first == second and first["tasks"]["arc_easy"]["rows"] == 2


def test_examples_in_prompts(rows):
    """None where there is no split to take them from; else from the split that the task names."""
    with pytest.raises(InputError, match=r"gsm8k \(train.jsonl"):
        select(["gsm8k"], rows)
    (task,) = select(["gsm8k"], rows, num_fewshot=0).tasks
    assert task.has_test_docs() and not task.has_training_docs()
    with pytest.raises(InputError, match=r"mmlu_anatomy \(dev.jsonl"):
        select(["mmlu_anatomy"], rows, num_fewshot=2)


@pytest.mark.slow
def test_code_is_run_apart_and_only_with_leave(rows):
    with pytest.raises(
        InputError, match=r"mbpp, which runs model-written programs .*--allow_code_execution"
    ):
        select(["mbpp"], rows)
    (task,) = select(["mbpp"], rows, allow_code_execution=True).tasks
    for code, wanted in [("def add(a, b): return a + b", 1.0), ("def add(a, b): return a", 0.0)]:
        assert task.process_results(MBPP, [code])["pass_at_1"] == wanted
    assert passes("import os; assert 'HOME' not in os.environ and os.listdir() == ['program.py']")
    assert passes("if __name__ == '__main__': raise ValueError\nopen = None")
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("x = bytearray(4 << 30)")
    assert not passes("import sys; sys.exit(3)") and not passes("\ud800")
    for leave in ["quit()", "import sys; sys.exit()", "import os; os._exit(0)"]:
        assert not passes(f"{leave}\nassert False")
    rates, _ = CodeEval().compute(references=["assert x"], predictions=[["x=1", "x=0"]], k=[1, 2])
    assert rates == {"pass@1": 0.5, "pass@2": 1.0}


def test_code_where_limits_are_lower_or_nothing_runs(rows, monkeypatch):
    program = "from finermoe_jax.evaluation.code_execution import passes; assert passes('pass')"
    shell = 'ulimit -f 1000 -t 8 && exec "$0" -c "$1"'
    subprocess.run(["bash", "-c", shell, sys.executable, program], check=True, timeout=300)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(InputError, match="programs cannot be run here"):
        select(["mbpp"], rows, allow_code_execution=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (["arc_easi"], {}, ["'arc_easi'", "Did you mean", "arc_easy"]),
        (["finermoe"], dict(allow_code_execution=True),
         ["no rows", "bbh: bbh_cot_fewshot_boolean_expressions (boolean_expressions.jsonl",
          "and 24 more", "mmlu: mmlu_abstract", "gpqa: ", "--skip_missing"]),
        (["gpqa_main_zeroshot"], {}, ["gpqa: gpqa_main_zeroshot (gpqa_main.jsonl"]),
        (["gpqa_main_zeroshot"], dict(skip_missing=True),
         ["contains no rows of gpqa_main_zeroshot"]),
        (["finermoe"], {}, ["mbpp", "--allow_code_execution"]),
        (["mmlu", "mmlu_anatomy"], dict(skip_missing=True), ["mmlu_anatomy twice", "mmlu"]),
        (["arc_challenge"], {}, ["task arc_challenge", "choices"]),
        (["bbh_cot_fewshot_snarks"], {}, ["max_gen_toks=1024", "=1024"]),
        (["arc_easy"], dict(chat=True), ["--apply_chat_template", "no chat template"]),
        (["arc_easy"], dict(limit=0), ["--limit=0"]),
        (["arc_easy"], dict(num_fewshot=-1), ["--num_fewshot=-1"]),
        (["agieval_math"], dict(num_fewshot=2), ["agieval_math needs 2 examples", "has 1 rows"]),
        # Two, one of which may be the row itself.
        (["hellaswag"], dict(num_fewshot=2), ["task hellaswag needs 2 examples", "has 1 rows"]),
        ([], {}, ["--tasks is empty"]),
        # Groups whose members are defined inside of them, some of these groups again.
        (["mmlu_continuation"], dict(skip_missing=True), ["--data_dir"]),
        (["flan_held_in"], dict(skip_missing=True), ["--data_dir"]),
        (["arc_easy"], dict(data_dir=Path("nowhere")), ["--data_dir=nowhere"]),
        (["arc_easy"], dict(data_dir=None), ["task arc_easy", "out of reach", "--data_dir"]),
        (["arc_easy"], dict(data_dir=None, skip_missing=True), ["--skip_missing", "--data_dir"]),
    ],
)  # fmt: skip
def test_refused_before_weights_are_read(rows, names, settings, words, monkeypatch):
    monkeypatch.setattr("finermoe_jax.evaluation.evaluate.read_model", None)

    def no_network(*_, **__):
        raise ConnectionError("the hub is out of reach")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(InputError) as error:
        evaluate(str(DEMO), tasks=Tasks(names, **{"data_dir": rows} | settings))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"question": "\xff"}\n', ["test.jsonl, line 1", "not UTF-8"]),
        (b'{"question": "\\ud83d"}\n', ["test.jsonl, line 1", "half of a surrogate pair"]),
        (b'\n{"question": \n', ["test.jsonl, line 2", "not readable as JSON"]),
        (b'{"id": ' + b"1" * 5000 + b"}", ["test.jsonl, line 1", "more than 4300 digits"]),
        (b"[" * 100_000, ["test.jsonl, line 1", "nested more than 64 levels"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["test.jsonl", "git lfs pull"]),
        (b"[1]\n", ["test.jsonl, line 1", "not a JSON object"]),
        (b"\n", ["test.jsonl", "no rows"]),
    ],
)
def test_damaged_rows(tmp_path, content, words):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_bytes(content)
    with pytest.raises(InputError) as error:
        select(["arc_easy"], tmp_path)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"answerKey": None}, "ValueError"),
        ({"answerKey": "Z"}, "ValueError: 'Z' is not in list"),
        ({"choices": None}, "row 1"),
        ({"choices": CHOICES | {"text": ["one"]}}, "ValueError: its answer 1 is not in 0 … 0"),
    ],
)
def test_rows_that_a_task_cannot_use(tmp_path, monkeypatch, second, words):
    """After the first, which the harness looks at by itself."""
    monkeypatch.setattr("finermoe_jax.evaluation.evaluate.read_model", None)
    changed = {key: x for key, x in (ARC[1] | second).items() if x is not None}
    _write(tmp_path / "arc_easy" / "test.jsonl", [ARC[0], changed])
    with pytest.raises(InputError, match=r"task arc_easy, row 1 is unusable: ") as error:
        evaluate(str(DEMO), tasks=Tasks(["arc_easy"], tmp_path))
    assert words in str(error.value)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        evaluate(str(DEMO), tasks=Tasks(["arc_easy"], tmp_path, limit=1))


def test_a_checkpoint_that_is_not_there_is_said_first(tmp_path):
    """Before the harness is loaded, which would refuse this task."""
    with pytest.raises(InputError, match="is neither a directory nor a Hub id"):
        evaluate(str(tmp_path / "nowhere"), tasks=Tasks(["arc_easi"], tmp_path))


def test_ten_without_rows_have_no_mean(tmp_path):
    answers = {f"Incorrect Answer {i}": f"No, {i}." for i in (1, 2, 3)}
    row = {"Question": "Which?", "Correct Answer": "This."} | answers
    _write(tmp_path / "gpqa" / "gpqa_diamond.jsonl", [row])
    options = dict(skip_missing=True, allow_code_execution=True)
    assert select(["gpqa_diamond_zeroshot"], tmp_path, **options).tasks
    with pytest.raises(InputError, match="no rows of the ten benchmarks of finermoe"):
        select(["finermoe", "gpqa_diamond_zeroshot"], tmp_path, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text=t.txt", "--limit=3"], ["--limit=3", "without --tasks"]),
        (["--tasks=arc_easy", "--stride=3"], ["--stride=3", "without --text"]),
        (["--text=t.txt", "--output=."], ["--output=. is a directory"]),
    ],
)
def test_flags_that_do_not_fit(arguments, words):
    assert_refused(command("eval", "--checkpoint=nowhere", *arguments), *words)


def test_what_is_not_there(rows, tmp_path, monkeypatch):
    for file in DEMO.iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no tokenizer"):
        evaluate(str(tmp_path), tasks=Tasks(["arc_easy"], rows))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    with pytest.raises(InputError, match=r"pip install 'finermoe-jax\[eval\]'"):
        evaluate(str(DEMO), tasks=Tasks(["arc_easy"], rows))
