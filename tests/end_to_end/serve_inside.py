"""Exported directories inside vLLM and transformers, without jax or a server: one JSON line each.

    python tests/end_to_end/serve_inside.py router DIR
    python tests/end_to_end/serve_inside.py tokens eager|compiled DIR…
    python tests/end_to_end/serve_inside.py batching DIR sdpa|eager
    python tests/end_to_end/serve_inside.py client ADDRESS MODEL

Runs in the environment that .ci/serve makes. `router` serves DIR in bfloat16 and compares every
router with the float32 product of the rows it was given. The others read {"prompts": [[id, …], …],
"new": N} from stdin and return the greedy tokens: of vLLM in float32, by DIR, of transformers'
continuous batching in float32, or of MODEL on the server at ADDRESS (http://HOST:PORT/v1).
"""

import concurrent.futures
import json
import sys
import time
from pathlib import Path


def engine(directory, dtype, compiled=False):
    """The model in vLLM, in this process, and the seconds that it took to load."""
    from vllm import LLM

    start = time.time()
    model = LLM(
        directory,
        dtype=dtype,
        max_model_len=256,
        model_impl="transformers",
        trust_remote_code=True,
        enforce_eager=not compiled,
        skip_tokenizer_init=not (Path(directory) / "tokenizer.json").exists(),
        disable_log_stats=True,
    )
    return model, time.time() - start


def greedy(model, prompts, new):
    """The new tokens of every prompt."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": ids} for ids in prompts]
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return [list(out.outputs[0].token_ids) for out in model.generate(asked, settings)]


def router(directory):
    """The routers' classes and dtypes, and tokens whose experts differ from the float32 product's.

    "in bfloat16": the tokens that would choose other experts if the product were bfloat16.
    """
    import torch

    seen = []

    def watch(model):
        for module in model.modules():
            if type(module).__name__ == "FineRMoeRouter":
                module.register_forward_hook(lambda m, x, y: seen.append((m, x[0].clone(), y)))

    def chosen(module, logits):
        return module.route(logits)[0].sort(-1).values

    model, _ = engine(directory, "bfloat16")
    model.apply_model(watch)
    greedy(model, [[7 * i % 97 + 3 for i in range(k, k + 12)] for k in range(16)], 20)
    found = {"tokens": 0, "other logits": 0, "other experts": 0, "in bfloat16": 0}
    with torch.inference_mode():
        for module, rows, logits in seen:
            assert rows.dtype == module.weight.dtype == torch.bfloat16, "not a bfloat16 model"
            wide = rows.float() @ module.weight.float().T
            low = (rows @ module.weight.T).float()
            found["tokens"] += len(rows)
            far = (logits - wide).abs().amax(-1) > 1e-4
            for kind, differs in (
                ("other logits", far),
                ("other experts", (chosen(module, logits) != chosen(module, wide)).any(-1)),
                ("in bfloat16", (chosen(module, low) != chosen(module, wide)).any(-1)),
            ):
                found[kind] += int(differs.sum())
    return found | {
        "logits": sorted({str(logits.dtype) for *_, logits in seen}),
        "layers": len({id(module) for module, *_ in seen}),
    }


def tokens(mode, *directories):
    """For every model, vLLM's greedy tokens and the seconds it took to load, or its error."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    asked, found = json.load(sys.stdin), {}
    for directory in directories:
        try:
            model, seconds = engine(directory, "float32", mode == "compiled")
            answers = greedy(model, asked["prompts"], asked["new"])
            found[directory] = {"seconds": seconds, "tokens": answers}
            del model
        except Exception as error:  # of any kind: this is a report
            found[directory] = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
    return found


def batching(directory, attention):
    """The greedy tokens of transformers' continuous batching, in float32."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    asked = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, attn_implementation=attention
    )
    found = model.generate_batch(
        asked["prompts"],
        GenerationConfig(max_new_tokens=asked["new"], do_sample=False, eos_token_id=-1),
        # Without these it sizes its cache by the machine's memory.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256),
    )
    for out in found.values():
        assert out.error is None, out.error
    texts = {tuple(out.prompt_ids): list(out.generated_tokens) for out in found.values()}
    return {"tokens": [texts[tuple(ids)] for ids in asked["prompts"]]}


def client(address, model):
    """The greedy tokens of the first prompt alone, then those of all prompts at once."""
    from openai import OpenAI

    asked = json.load(sys.stdin)
    server = OpenAI(base_url=address, api_key="none", timeout=300, max_retries=0)

    def complete(ids):
        answer = server.completions.create(
            model=model,
            prompt=ids,
            max_tokens=asked["new"],
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].token_ids

    alone = complete(asked["prompts"][0])
    with concurrent.futures.ThreadPoolExecutor(len(asked["prompts"])) as pool:
        return {"tokens": [alone, list(pool.map(complete, asked["prompts"]))]}


if __name__ == "__main__":
    job, *arguments = sys.argv[1:]
    jobs = {"router": router, "tokens": tokens, "batching": batching, "client": client}
    print(json.dumps(jobs[job](*arguments)))
