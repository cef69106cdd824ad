"""Mutation testing: introduces faults one by one and checks that a test fails.

    python benchmarks/studies/mutations.py OUT.json             # half an hour on 2 CPU cores
    python benchmarks/studies/mutations.py OUT.json --only=WORDS --most=1 --again

Each mutation replaces a line, or a part of one, in a copy of the working tree. Then the tests that
should notice it run until the first failure. A mutation is killed if a test fails. It survives if
they and the wider selection pass; then an assertion is missing, or the line does nothing. OUT.json
stores the results. A stored mutation runs again only if it, its tests or the line have changed,
or, with --again, if it survived. Do not add mutations that no program can tell from the original.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1200.0  # seconds per selection of tests


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One fault. `tests` are arguments of pytest; `wider` run if these pass."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    wider: str = ""


ROUTING = "finermoe_jax/moe/routing.py"
BALANCE = "finermoe_jax/moe/balance.py"
UPCYCLE = "finermoe_jax/weights/upcycle.py"
VARIANTS = "finermoe_jax/weights/upcycle_variants.py"
EXCHANGE = "finermoe_jax/moe/exchange.py"
LOSSES = "finermoe_jax/model/losses.py"
STACK = "finermoe_jax/model/stack.py"
STEP = "finermoe_jax/training/step.py"
OPTIM = "finermoe_jax/training/optimizer.py"
DATA = "finermoe_jax/data/batches.py"
TRAINING = "finermoe_jax/training/run.py"
LOOP = "finermoe_jax/training/loop.py"

LAYER = "tests/moe/test_layer.py"
OF_ROUTING = (
    "tests/moe/test_routing.py tests/moe/test_balance.py tests/moe/test_layer.py "
    "tests/end_to_end/test_parity.py"
)
OF_UPCYCLING = (
    "tests/moe/test_layer.py tests/weights/test_upcycle_variants.py "
    "tests/config/test_architectures.py tests/model/test_decoder.py "
    "tests/end_to_end/test_parity.py tests/weights/test_verify.py"
)
INTERRUPTED = "tests/end_to_end/test_interrupted_runs.py"
OF_STEPS = f"tests/training/test_run.py tests/training/test_optimizer.py {INTERRUPTED}"
OF_RUNS = f"{INTERRUPTED} tests/training/test_run.py tests/training/test_monitor.py"

MUTATIONS = (
    # --- routing ---------------------------------------------------------------------------
    Mutation(
        "a group's score sums its marked logits alone", ROUTING,
        "_group_scores(grouped, moe, None if allowed is None else in_groups(allowed, moe))",
        "jnp.take_along_axis(grouped, marked, axis=-1).sum(axis=-1)",
        "tests/moe/test_routing.py", OF_ROUTING,
    ),
    Mutation(
        "masked experts stay in a group's score", ROUTING,
        "grouped = where_allowed(allowed, grouped, 0.0)",
        "pass",
        "tests/moe/test_pools.py -k loop", OF_ROUTING,
    ),
    Mutation(
        "layers that share experts overwrite each other's gradients", STACK,
        "adds = pool in pools[place + 1 :]",
        "adds = False",
        "tests/moe/test_pools.py -k gradient", OF_ROUTING,
    ),
    Mutation(
        "routers that should read an earlier layer read their own", "finermoe_jax/model/block.py",
        "return inputs[-1], (own",
        "return own, (own",
        "tests/model/test_route_ahead.py -k loop",
    ),
    Mutation(
        "experts in host memory are copied when their layer begins", STACK,
        "self.ready[layer + 1] = following",
        "self.ready[layer + 1], following = following, None",
        "tests/model/test_offload.py -k transfers_start",
    ),
    Mutation(
        "products may be scheduled before the choice of experts", "finermoe_jax/moe/bank.py",
        "x, chosen = lax.optimization_barrier((x, chosen))",
        "_, chosen = lax.optimization_barrier((x, chosen))",
        "tests/model/test_offload.py -k transfers_start",
    ),
    Mutation(
        "weights are a softmax in the activations' dtype", ROUTING,
        "by_logit, axis=-1).astype(jnp.float32)",
        "by_logit, axis=-1).astype(weight_dtype)",
        "tests/moe/test_routing.py -k rounded", OF_ROUTING,
    ),
    Mutation(
        "a slot's factor goes to another slot", ROUTING,
        "weights *= jnp.take_along_axis(scale, by_logit, axis=-1)",
        "weights *= scale",
        f"{LAYER}::test_gradients[separate_routers]", OF_ROUTING,
    ),
    Mutation(
        "a candidate's probability is its share of its slot's sum", ROUTING,
        "probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)",
        "probabilities = jax.nn.sigmoid(scores.astype(jnp.float32))",
        f"{LAYER}::test_gradients[separate_routers]", OF_ROUTING,
    ),
    Mutation(
        "Eq. 11 counts a token once per expert, not per active expert", BALANCE,
        "choices / (active * counted)",
        "choices / counted",
        "tests/moe/test_balance.py", OF_ROUTING,
    ),
    Mutation(
        "Eq. 11 is averaged over rows of padding, too", BALANCE,
        "/ jnp.maximum(holds_token.sum(), 1)",
        "/ holds_token.size",
        "tests/moe/test_balance.py", OF_ROUTING,
    ),
    Mutation(
        "the router computes in the activations' dtype", "finermoe_jax/moe/layer.py",
        "dtype = jnp.dtype(self.moe.router_dtype)",
        "dtype = x.dtype",
        f"{LAYER} -k bfloat16", OF_ROUTING,
    ),
    # --- upcycling -------------------------------------------------------------------------
    Mutation(
        "the routers of all layers are drawn from one key", UPCYCLE,
        "keys[moe_layers.index(layer) * len(drawn) + place]",
        "keys[place]",
        "tests/weights/test_upcycle_variants.py -k key", OF_UPCYCLING,
    ),
    Mutation(
        "router and shared gate are drawn from one key", UPCYCLE,
        "keys[moe_layers.index(layer) * len(drawn) + place]",
        "keys[moe_layers.index(layer) * len(drawn)]",
        "tests/weights/test_upcycle_variants.py -k key", OF_UPCYCLING,
    ),
    Mutation(
        "train.seed draws nothing", "finermoe_jax/training/initial.py",
        "key = jax.random.key(config.train.seed)",
        "key = jax.random.key(0)",
        "tests/weights/test_upcycle_variants.py -k seed",
        f"{OF_UPCYCLING} tests/training/test_run.py",
    ),
    Mutation(
        "an expert's slot goes by its candidate", UPCYCLE,
        "expert // (moe.output_expansion * moe.group_size)",
        "expert // moe.group_size % moe.output_granularity",
        f"{LAYER} -k upcycl", OF_UPCYCLING,
    ),
    Mutation(
        "without a shared expert the output is scaled by G_O", UPCYCLE,
        "lazy.scaled(part, moe.intermediate_granularity)",
        "lazy.scaled(part, moe.output_granularity)",
        f"{LAYER} -k upcycl", OF_UPCYCLING,
    ),
    Mutation(
        "an untied lm_head becomes the embedding", UPCYCLE,
        'weights.get(path, weights["embed", "weight"])',
        'weights["embed", "weight"] if path[0] == "lm_head" else weights[path]',
        "tests/end_to_end/test_parity.py -k test_upcycled_weights", OF_UPCYCLING,
    ),
    Mutation(
        "a run of layers begins with the first ones", UPCYCLE,
        "rows[layers[i]][rest]",
        "rows[i][rest]",
        "tests/weights/test_upcycle_variants.py -k some_layers", OF_UPCYCLING,
    ),
    Mutation(
        "function-preserving: the gate is doubled in place of the down-projection", UPCYCLE,
        'scales = upcycling.function_preserving and name[2] == "down"',
        'scales = upcycling.function_preserving and name[2] == "gate"',
        "tests/weights/test_upcycle_variants.py -k preserving", OF_UPCYCLING,
    ),
    Mutation(
        "drop-upcycling: another set of channels for each matrix", VARIANTS,
        "channels = sampling.permutation(width)",
        "channels = matrices[first].permutation(width)",
        "tests/weights/test_upcycle_variants.py -k channels", OF_UPCYCLING,
    ),
    Mutation(
        "virtual groups: rows shared by the copies of a slice", VARIANTS,
        "np.arange(moe.num_experts) // slices * slices",
        "np.arange(moe.num_experts) % slices",
        "tests/weights/test_upcycle_variants.py -k virtual", OF_UPCYCLING,
    ),
    # --- dispatch and exchange -------------------------------------------------------------
    Mutation(
        "a token's gradient is the mean of its copies'", EXCHANGE,
        "g[inverse].reshape(-1, active, *g.shape[1:]).sum(axis=1)",
        "g[inverse].reshape(-1, active, *g.shape[1:]).mean(axis=1)",
        f"{LAYER}::test_gradients[published]", "tests/end_to_end/test_parity.py",
    ),
    Mutation(
        "gradients are permuted as the rows were, not back", EXCHANGE,
        "lambda inverse, g: (g[inverse], None, None),",
        "lambda inverse, g: (g[inverse_of(inverse)], None, None),",
        f"{LAYER}::test_gradients[published]", "tests/end_to_end/test_parity.py",
    ),
    Mutation(
        "buffers hold four times the balanced share", EXCHANGE,
        "min(rows, -(-2 * rows // devices))",
        "min(rows, -(-4 * rows // devices))",
        "tests/moe/test_exchange.py -k buffer", "tests/moe/test_exchange.py",
    ),
    Mutation(
        "the forward pass leaves out the last round", EXCHANGE,
        "lax.fori_loop(1, plan.rounds, lambda i, out:",
        "lax.fori_loop(1, plan.rounds - 1, lambda i, out:",
        "tests/moe/test_exchange.py -k dropped", "tests/moe/test_exchange.py",
    ),
    Mutation(
        "later rounds' experts are the first round's", EXCHANGE,
        "place = step * self.quota + jnp.arange(self.quota)",
        "place = jnp.arange(self.quota)",
        "tests/moe/test_exchange.py -k one_devices_result", "tests/moe/test_exchange.py",
    ),
    Mutation(
        "of the experts' gradients the last round's is kept", EXCHANGE,
        "return round_of(step, again, sums, adds=True)",
        "return round_of(step, again, sums, adds=False)",
        "tests/moe/test_exchange.py -k one_devices_result", "tests/moe/test_exchange.py",
    ),
    Mutation(
        "a round after a pair's last one moves a negative number of rows", EXCHANGE,
        "return jnp.maximum(end - jnp.maximum(begin, low), 0)",
        "return end - jnp.maximum(begin, low)",
        "tests/moe/test_exchange.py -k ragged", "tests/moe/test_exchange.py",
    ),
    Mutation(
        "a round after a pair's last one begins behind the rows", EXCHANGE,
        "return jnp.minimum(index, counts.sum(axis=1)[:, None, None])",
        "return index",
        "tests/moe/test_exchange.py -k ragged", "tests/moe/test_exchange.py",
    ),
    # --- losses ----------------------------------------------------------------------------
    Mutation(
        "targets that are not counted have a gradient", LOSSES,
        "jnp.where(real[:, None], probabilities - chosen, 0.0)",
        "(probabilities - chosen)",
        "tests/training/test_run.py -k packed_documents", "tests/training/test_run.py",
    ),
    Mutation(
        "the head's gradient is summed in bfloat16", LOSSES,
        "start = jnp.float32(0), jnp.zeros(whole.shape, jnp.float32)",
        "start = jnp.float32(0), jnp.zeros(whole.shape, whole.dtype)",
        "tests/training/test_step.py -k activations", f"{OF_STEPS} tests/end_to_end/test_parity.py",
    ),
    Mutation(
        "logits of the loss are rounded to bfloat16", LOSSES,
        'logits = jnp.einsum("MD,VD->MV", h, weight, preferred_element_type=jnp.float32)',
        'logits = jnp.einsum("MD,VD->MV", h, weight).astype(jnp.float32)',
        "tests/training/test_step.py -k activations", f"{OF_STEPS} tests/end_to_end/test_parity.py",
    ),
    # --- step ------------------------------------------------------------------------------
    Mutation(
        "the non-finite check does not look at the loss", STEP,
        'finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"] + metrics["aux_loss"])',
        "finite = jnp.isfinite(norm)",
        f"{INTERRUPTED} -k balance", OF_STEPS,
    ),
    Mutation(
        "the balancing losses are averaged over layers", STEP,
        "balance.weight * features.aux_loss.sum()",
        "balance.weight * features.aux_loss.mean()",
        "tests/training/test_step.py -k balancing", OF_STEPS,
    ),
    Mutation(
        "microbatches of packed rows count as much each", STEP,
        "jnp.maximum(counted(batch).sum(dtype=jnp.float32), 1.0) / parts",
        "jnp.maximum(counted(batch).sum(dtype=jnp.float32), 1.0)",
        "tests/training/test_run.py -k packed_documents", OF_STEPS,
    ),
    Mutation(
        "bfloat16 gradients of microbatches are summed in bfloat16", STEP,
        "if path in banks else jnp.zeros(p.shape, jnp.float32)",
        "if path in banks else jnp.zeros(p.shape, p.dtype)",
        "tests/training/test_step.py -k microbatches", OF_STEPS,
    ),
    Mutation(
        "bfloat16 weights are rounded by the same draw in every step", STEP,
        "jax.random.fold_in(jax.random.key(config.train.seed), updates_made(opt_state))",
        "jax.random.key(config.train.seed)",
        "tests/training/test_step.py -k rounded", OF_STEPS,
    ),
    Mutation(
        "the rate goes down to zero, not to the final rate", OPTIM,
        "end_value=config.final_learning_rate,",
        "end_value=0.0,",
        "tests/training/test_optimizer.py -k adamws", OF_STEPS,
    ),
    Mutation(
        "gradients are not clipped", OPTIM,
        "optax.chain(optax.clip_by_global_norm(config.clip_norm), second)",
        "optax.chain(optax.identity(), second)",
        "tests/training/test_optimizer.py -k adamws", OF_STEPS,
    ),
    Mutation(
        "AdamW's second mean has Optax's default rate", OPTIM,
        "b2=config.beta2,",
        "b2=0.999,",
        "tests/training/test_optimizer.py -k adamws", OF_STEPS,
    ),
    # --- data order ------------------------------------------------------------------------
    Mutation(
        "every source is shuffled by one seed", DATA,
        ".seed(_seed(seed, part)).shuffle()",
        ".seed(seed).shuffle()",
        "tests/data/test_batches.py -k one_size", "tests/data/test_batches.py",
    ),
    Mutation(
        "data.seed orders the first source alone", DATA,
        "np.random.SeedSequence([seed, part])",
        "np.random.SeedSequence([part])",
        "tests/data/test_batches.py -k one_size", "tests/data/test_batches.py",
    ),
    Mutation(
        "held-out windows begin inside the training text", DATA,
        "return first, Windows(source.tokens, length, cut, total)",
        "return first, Windows(source.tokens, length, cut - length, total)",
        "tests/data/test_batches.py -k held_out",
        "tests/data/test_batches.py tests/data/test_token_files.py",
    ),
    Mutation(
        "a left-out batch is told with the epoch of its first row", DATA,
        "epoch = rows.turn(first + row)[1]",
        "epoch = rows.turn(first)[1]",
        "tests/data/test_batches.py -k known_by_its_step",
        f"tests/data/test_batches.py {INTERRUPTED}",
    ),
    Mutation(
        "packed documents share their positions", "finermoe_jax/data/packing.py",
        '"position_ids": slots - first,',
        '"position_ids": slots,',
        "tests/data/test_batches.py -k every_target_once", "tests/data/test_batches.py",
    ),
    # --- resume ----------------------------------------------------------------------------
    Mutation(
        "a resumed run starts the data again", LOOP,
        "_global_batches(setup.config, setup.data.train, first,",
        "_global_batches(setup.config, setup.data.train, 0,",
        f"{INTERRUPTED} -k killed_and_stopped", OF_RUNS,
    ),
    Mutation(
        "a resumed run forgets the skipped steps", TRAINING,
        "here, first - int(updates_made(opt_state)), in_a_row, say)",
        "here, 0, in_a_row, say)",
        f"{INTERRUPTED} -k poisoned", OF_RUNS,
    ),
    Mutation(
        "a resumed run logs the steps since its checkpoint twice", TRAINING,
        "log.cut(-1 if first is None else first)",
        "log.cut(-1 if first is None else first + 1)",
        f"{INTERRUPTED} -k goes_on", OF_RUNS,
    ),
    Mutation(
        "steps left out long ago count as in a row", "finermoe_jax/training/nonfinite.py",
        'if not metrics["skipped"]:\n            self.in_a_row = 0',
        'if not metrics["skipped"]:\n            self.in_a_row += 0',
        f"{INTERRUPTED} -k poisoned", OF_RUNS,
    ),
)  # fmt: skip


def import_others() -> None:
    """Imports the third-party packages that the tests need, and nothing of this project."""
    # JAX reads these when it is imported; the last two are as in tests/conftest.py.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    # JAX warns of forking a process with threads; none has started yet.
    warnings.filterwarnings("ignore", message=".*fork")
    for name in ("flax.nnx", "grain", "optax", "orbax.checkpoint", "transformers"):
        importlib.import_module(name)


@dataclasses.dataclass
class Tree:
    """A copy of the working tree in which tests run."""

    folder: Path

    @classmethod
    def copied(cls, folder: Path) -> "Tree":
        """Copies the tracked and the untracked files, without ignored ones."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        return cls(folder)

    def failing(self, tests: str) -> str:
        """Returns the first test that fails, or "" if all pass.

        Runs in a fork, so that third-party packages, which take most of the time, are imported
        once. Raises RuntimeError if no tests ran.
        """
        with tempfile.TemporaryFile("w+") as said:
            child = os.fork()
            if child == 0:
                self._test(said.fileno(), tests)
            code = _ended(child)
            said.seek(0)
            output = said.read()
        if code is None:
            return f"no end within {TIMEOUT:.0f} s"
        if code not in (0, 1):
            raise RuntimeError(f"pytest {tests}: {code}\n{output[-3000:]}")
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return "" if code == 0 else found[1] if found else "a test"

    def _test(self, output: int, tests: str) -> NoReturn:
        """Runs pytest in the child and always ends the process."""
        code = 3
        try:
            os.setpgid(0, 0)
            os.dup2(output, 1), os.dup2(output, 2)
            os.chdir(self.folder)
            os.environ["PYTHONPATH"] = str(self.folder)
            sys.path.insert(0, str(self.folder))
            imported = "ignore::pytest.PytestAssertRewriteWarning"
            code = int(pytest.main(["-x", "-n", "0", "-W", imported, *shlex.split(tests)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)


def _ended(child: int) -> int | None:
    """Waits for a process. Returns its exit code, or None if it was killed at the timeout."""
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def tried(mutation: Mutation, tree: Tree, narrow: bool) -> dict:
    """Runs a mutation. Returns its record: the test that killed it, if any, and the seconds."""
    path = tree.folder / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise RuntimeError(
            f"{mutation.name}: {mutation.file} holds {mutation.old!r} {text.count(mutation.old)} "
            "times, not once"
        )
    began = time.perf_counter()
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        by = tree.failing(mutation.tests)
        if not by and mutation.wider and not narrow:
            by = tree.failing(mutation.wider)
    finally:
        path.write_text(text)
    seconds = round(time.perf_counter() - began, 1)
    return dataclasses.asdict(mutation) | {"killed_by": by, "seconds": seconds}


def known(mutation: Mutation, record: dict | None) -> bool:
    """Returns True if the record is of this mutation, unchanged."""
    return record is not None and dataclasses.asdict(mutation).items() <= record.items()


def refuse_stale() -> None:
    """Raises SystemExit if the code no longer has the text that a mutation replaces."""
    stale = [m for m in MUTATIONS if (ROOT / m.file).read_text().count(m.old) != 1]
    if stale:
        lines = [f"{m.name}: {m.file} does not have once: {m.old}" for m in stale]
        raise SystemExit("\n".join(["these mutations do not fit the code:", *lines]))


def chosen(arguments: argparse.Namespace, records: dict[str, dict]) -> Iterator[Mutation]:
    """Yields the mutations that still have to run."""
    left = arguments.most
    for mutation in MUTATIONS:
        record = records.get(mutation.name)
        again = arguments.again and record is not None and not record["killed_by"]
        if arguments.only not in mutation.name or (known(mutation, record) and not again):
            continue
        if left == 0:
            return
        left -= 1
        yield mutation


def table(records: dict[str, dict]) -> str:
    """A Markdown table of killed and surviving mutations."""
    lines = ["| fault | where | killed by |", "|---|---|---|"]
    for mutation in MUTATIONS:
        if known(mutation, record := records.get(mutation.name)):
            assert record is not None
            by = record["killed_by"].removeprefix("tests/") or "**survived**"
            lines.append(f"| {mutation.name} | `{Path(mutation.file).name}` | `{by}` |")
    done = [records[m.name] for m in MUTATIONS if known(m, records.get(m.name))]
    killed = sum(bool(record["killed_by"]) for record in done)
    return "\n".join([*lines, "", f"{killed} of {len(done)} killed"])


def main() -> int:
    """Runs the remaining mutations, stores each result, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="JSON file of the results")
    parser.add_argument("--only", default="", help="run mutations whose name has these words")
    parser.add_argument("--most", type=int, default=-1, help="run at most this many (default: all)")
    parser.add_argument("--narrow", action="store_true", help="omit the wider selections of tests")
    parser.add_argument("--again", action="store_true", help="run surviving mutations again")
    arguments = parser.parse_args()
    refuse_stale()
    records = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    wanted = list(chosen(arguments, records))
    if wanted:
        import_others()
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree.copied(Path(folder)) if wanted else None
        for number, mutation in enumerate(wanted, 1):
            assert tree is not None
            record = records[mutation.name] = tried(mutation, tree, arguments.narrow)
            arguments.out.write_text(json.dumps(records, indent=1) + "\n")
            result = f"killed by {record['killed_by']}" if record["killed_by"] else "SURVIVED"
            print(f"[{number}/{len(wanted)}] {record['seconds']:6.0f} s  {mutation.name}: {result}",
                  file=sys.stderr, flush=True)  # fmt: skip
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
