"""Trains the demo, exports it, serves it with vLLM and compares the tokens with `fm.generate`'s.

    python tests/end_to_end/serve_check.py SERVING_PYTHON [--work=DIR] [--only=NAME,…]

Runs in the project's environment; SERVING_PYTHON is that of vLLM's own (.ci/serve makes both). Two
cores and 5 GiB of memory are enough. Checks, each a line with its counts:

    float32, bfloat16   vLLM's OpenAI server on loopback, asked by the package openai: one request,
                        then sixteen at once
    tp2                 the same in float32 on two processes (tensor parallelism)
    compiled            without --enforce-eager, in float32
    router              bfloat16: every router's logits equal the float32 product
    batching            transformers' continuous batching, with sdpa and with eager attention
    variants            pools, selection biases, q/k norms, scaled rotary embeddings, mixed layers,
                        routing ahead and concat_proj, in vLLM without a server

In float32 the token ids must be equal. In bfloat16 the order of roundings differs between the two
programs and with the size of the batch. There `fm`'s logits of the same export in bfloat16, for the
served text, must have each served token within MARGIN of the largest logit.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
INSIDE = Path(__file__).parent / "serve_inside.py"
DEMO_TEXT = ROOT / "finermoe_jax" / "demo" / "pydoc_small.txt"
TOKENS, REQUESTS = 40, 16
# Two steps of bfloat16 at a logit of 8 to 16: vLLM rounds logits to bfloat16.
MARGIN = 0.125
LOAD_SECONDS = 300
# Head sizes that vLLM's attention has on a CPU start at 32.
SHAPE = dict(
    vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=1e4, rms_norm_eps=1e-6,
    max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip


def environment(work, **more):
    """The environment of programs that serve: no network, caches in `work`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAX_PLATFORMS")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; otherwise a share of the machine's memory
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HOME": str(work / "home"),
        "VLLM_CACHE_ROOT": str(work / "home" / "vllm"),
        **more,
    }


def exported(work):
    """Directories of the demo, trained 20 steps, in float32 and in bfloat16."""
    command = [sys.executable, "-m", "finermoe_jax"]
    run = work / "run"
    if not (run / "checkpoints" / "20").exists():
        subprocess.run(
            [*command, "train", "--config=demo", "--config.train.steps=20", f"--workdir={run}"],
            check=True,
        )
    for dtype in ("float32", "bfloat16"):
        if not (work / dtype).exists():
            subprocess.run(
                [*command, "convert", f"--source={run}", f"--target={work / dtype}", "--to=hf",
                 f"--dtype={dtype}"], check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
    return work / "float32", work / "bfloat16"


def prompts(directory):
    """Sixteen prompts of the demo's text, of 5 to 20 tokens."""
    import finermoe_jax as fm

    ids = fm.load_tokenizer(directory)(DEMO_TEXT.read_text()[:20000])["input_ids"]
    return [list(map(int, ids[100 * i : 100 * i + 5 + i])) for i in range(REQUESTS)]


def ours(directory, asked, new=TOKENS):
    """`fm.generate`'s greedy tokens in float32, for every prompt by itself."""
    import jax.numpy as jnp

    import finermoe_jax as fm

    model = fm.load_hf(directory, dtype=jnp.float32)
    # One batch, padded left, is one compilation.
    width = max(map(len, asked))
    ids = [[0] * (width - len(row)) + row for row in asked]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in asked]
    return [row[width:].tolist() for row in fm.generate(model, ids, mask, max_new_tokens=new)]


def margins(directory, asked, answers):
    """Distance of each served token below the largest of `fm`'s bfloat16 logits, [tokens]."""
    import jax.numpy as jnp
    import numpy as np

    import finermoe_jax as fm

    model = fm.load_hf(directory, dtype=jnp.bfloat16)
    width = max(map(len, asked)) + TOKENS
    rows = [a + b for a, b in zip(asked, answers, strict=True)]
    ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int32)
    logits = np.asarray(model(ids, mask).logits, np.float32)
    found = []
    for row, (start, answer) in enumerate(zip(map(len, asked), answers, strict=True)):
        at = logits[row, start - 1 : start - 1 + len(answer)]
        found.extend(at.max(-1) - at[np.arange(len(answer)), answer])
    return np.array(found)


class Server:
    """vLLM's OpenAI server on a free port of loopback; it ends with the context."""

    def __init__(self, python, directory, dtype, work, *flags, **variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = open(work / "server.log", "w")  # noqa: SIM115
        self.start = time.time()
        self.process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", f"--model={directory}",
             "--host=127.0.0.1", f"--port={self.port}", f"--dtype={dtype}", "--max-model-len=256",
             "--model-impl=transformers", "--trust-remote-code", "--enforce-eager",
             "--served-model-name=demo", *flags],
            env=environment(work, **variables), stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        while time.time() - self.start < LOAD_SECONDS:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
            except OSError:
                time.sleep(1)
            else:
                self.seconds = time.time() - self.start
                return self
        self.__exit__()
        raise SystemExit(f"the server did not start:\n{Path(self.log.name).read_text()[-4000:]}")

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.log.close()


def equal(got, wanted):
    """Counts of equal texts and tokens, as text, and whether all are equal."""
    pairs = list(zip(got, wanted, strict=True))
    tokens = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))
    whole = sum(map(len, wanted))
    texts = sum(x == y for x, y in pairs)
    return f"{texts}/{len(wanted)} texts, {tokens}/{whole} tokens", got == wanted


def inside(python, work, *arguments, asked=None):
    """The answer of serve_inside.py."""
    done = subprocess.run(
        [python, str(INSIDE), *map(str, arguments)],
        input=json.dumps(asked), env=environment(work, VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"serve_inside.py {arguments}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def served(python, work, directory, asked, wanted, *flags, dtype="float32", **variables):
    """Answers of a server: a line about them, and whether they are right."""
    with Server(python, directory, dtype, work, *flags, **variables) as server:
        job = {"prompts": asked, "new": TOKENS}
        address = f"http://127.0.0.1:{server.port}/v1"
        alone, together = inside(python, work, "client", address, "demo", asked=job)["tokens"]
    line = f"ready after {server.seconds:.0f} s; "
    if dtype == "float32":
        one, first = equal([alone], wanted[:1])
        many, rest = equal(together, wanted)
        return f"{line}one request {one}; {len(asked)} at once {many}", first and rest
    below = margins(directory, [asked[0], *asked], [alone, *together])
    return (
        f"{line}{(below == 0).sum()}/{below.size} tokens are fm's choice in bfloat16, the others "
        f"at most {below.max():.3f} below it; {equal(together, wanted)[0]} as in float32"
    ), bool(below.max() <= MARGIN)


def variants():
    """Models with what else an export may have, by name."""
    import jax
    from flax import nnx

    import finermoe_jax as fm
    from finermoe_jax.config.model import RopeScaling

    def drawn(moe, **changes):
        config = fm.ModelConfig(**SHAPE | changes, moe=moe)
        model = fm.Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
        for index, run in enumerate(model.runs):
            for block in run:
                if moe.selection_bias and hasattr(block, "moe"):
                    for name in ("expert_bias", "group_bias"):
                        bias = getattr(block.moe, name)
                        bias[...] = jax.random.normal(jax.random.key(index), bias.shape)
        return model

    plain = fm.MoEConfig(4, 2, 1, 2, 1)
    llama3 = RopeScaling(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )  # fmt: skip
    yarn = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    return {
        "tied": drawn(plain, tie_word_embeddings=True),
        "several copies, two experts a slot": drawn(fm.MoEConfig(4, 4, 2, 2, 2)),
        "pool of copies": drawn(fm.MoEConfig(4, 2, 1, 2, 2, experts_across=2)),
        "pool of candidates, biased": drawn(
            fm.MoEConfig(
                4, 2, 1, 2, 1, experts_across=2, pooled_as="candidates", selection_bias=True
            )
        ),
        "norms of q and k, no biases": drawn(plain, qk_norm=True, attention_bias=False),
        "llama3": drawn(plain, rope_scaling=llama3),
        "yarn": drawn(plain, rope_scaling=yarn),
        "every other layer": drawn(fm.MoEConfig(4, 2, 1, 2, 1, decoder_sparse_step=2)),
        "routed one layer ahead": drawn(fm.MoEConfig(4, 2, 1, 2, 1, route_ahead=1)),
        "concat_proj": drawn(fm.MoEConfig(4, 2, 1, 2, 1, concat_proj="routed")),
    }


def check_variants(python, work):
    """Prints a line per variant; returns one about all, and whether each is served right."""
    import finermoe_jax as fm

    asked = [[(7 * i + 11 * k) % 97 for i in range(4 + k)] for k in range(4)]
    right = 0
    with tempfile.TemporaryDirectory(dir=work) as place:
        wanted = {}
        for name, model in variants().items():
            directory = str(Path(place) / name.replace(" ", "_").replace(",", ""))
            fm.save_hf(model, directory)
            wanted[directory] = ours(directory, asked, 20)
        job = {"prompts": asked, "new": 20}
        found = inside(python, work, "tokens", "eager", *wanted, asked=job)
    for directory, answer in found.items():
        line, same = answer.get("error"), False
        if line is None:
            line, same = equal(answer["tokens"], wanted[directory])
        print(f"  {Path(directory).name}: {line}", flush=True)
        right += same
    return f"{right} of {len(wanted)} variants have fm's tokens", right == len(wanted)


def checks(python, work):
    """Name to a function that returns a line and whether it is right."""
    float32, bfloat16 = exported(work)
    asked = prompts(float32)
    wanted = ours(float32, asked)
    job = {"prompts": asked, "new": TOKENS}

    def compiled():
        found = inside(python, work, "tokens", "compiled", float32, asked=job)[str(float32)]
        line, right = equal(found["tokens"], wanted)
        return f"loaded in {found['seconds']:.0f} s; {line}", right

    def router():
        found = inside(python, work, "router", bfloat16)
        right = found["logits"] == ["torch.float32"] and found["layers"] == 4
        right &= found["other logits"] == found["other experts"] == 0 < found["in bfloat16"]
        return f"{found}", right

    def batching():
        lines, right = [], True
        for attention in ("sdpa", "eager"):
            got = inside(python, work, "batching", float32, attention, asked=job)["tokens"]
            line, same = equal(got, wanted)
            lines.append(f"{attention} {line}")
            right &= same
        return "; ".join(lines), right

    two, cores = ["--tensor-parallel-size=2"], {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return {
        "float32": lambda: served(python, work, float32, asked, wanted),
        "bfloat16": lambda: served(python, work, bfloat16, asked, wanted, dtype="bfloat16"),
        "tp2": lambda: served(python, work, float32, asked, wanted, *two, **cores),
        "compiled": compiled,
        "router": router,
        "batching": batching,
        "variants": lambda: check_variants(python, work),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="the Python of vLLM's environment")
    parser.add_argument("--work", type=Path, help="keeps what is made; default: a new directory")
    parser.add_argument("--only", default="", help="names of checks, with commas between")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        every = checks(given.python, work)
        chosen = given.only.split(",") if given.only else list(every)
        wrong = []
        for name in chosen:
            line, right = every[name]()
            print(f"{'ok   ' if right else 'WRONG'} {name}: {line}", flush=True)
            wrong += [] if right else [name]
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
