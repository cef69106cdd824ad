"""Exported directories in transformers, without jax: loads each, compares what it computes.

    python tests/end_to_end/transformers_check.py DIR...

Runs in an environment of its own, with torch, transformers, safetensors and, for a run by Trainer,
accelerate (.ci/nightly makes one).
Each DIR holds `model/`, an exported Hugging Face directory, and `wanted.safetensors`, float32 and
int32:

    NAME.input_ids [B, T], NAME.attention_mask [B, T], NAME.logits [B, T, V]
                                    logits, compared where the mask is 1
    NAME.input_ids, NAME.attention_mask, NAME.sequences [B, T + new]
                                    greedy continuations (prompts padded left), whatever ends text
    NAME.input_ids, NAME.stopped [1, T + new]
                                    a greedy continuation up to the end of text
    NAME.input_ids, NAME.loss [1], NAME.aux_loss [1], NAME.grad.PARAMETER
                                    mean cross-entropy, load-balancing loss, gradients of the former

Prints one JSON object: transformers' version and, by DIR's name, what was loaded and the largest
difference of every kind. Writes `DIR/again`, the model as transformers saves it. Runs on
transformers 4.51 and 5.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

OLD = transformers.__version__.startswith("4.")


def load(directory, dtype, auto=AutoModelForCausalLM):
    """A model; any tensor that is missing, extra or of another shape is an error."""
    keywords = {"torch_dtype" if OLD else "dtype": dtype}
    model, info = auto.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, **keywords
    )
    assert not any(info.values()), info
    return model.eval()


def difference(got, wanted, mask):
    """The largest difference where the mask is 1; a NaN anywhere is infinitely far off."""
    assert got.shape == wanted.shape and got.isfinite().all()
    return (got - wanted)[mask.bool()].abs().max().item()


def cached(model, ids, mask):
    """Logits of two prefills and then single tokens, all through one cache."""
    cache, logits, start = None, [], 0
    for end in (ids.shape[1] // 2, ids.shape[1] - 3, *range(ids.shape[1] - 2, ids.shape[1] + 1)):
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        )
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def greedy(model, ids, mask, new, **keywords):
    """The ids and `new` tokens more, whatever ends text."""
    return model.generate(
        ids,
        attention_mask=mask,
        eos_token_id=model.config.vocab_size,  # never comes up
        pad_token_id=0,
        max_new_tokens=new,
        do_sample=False,
        **keywords,
    )


def far(got, wanted):
    """The largest difference."""
    assert got.shape == wanted.shape
    return (got - wanted).abs().max().item()


def clients(model, directory, ids):
    """Differences of what other programs ask of a model with experts, for ids [B, T] unpadded."""
    base = model(ids).logits
    tokens = ids.shape[1]
    half = tokens // 2
    # Packed texts, of which the second is longer, and the same in rows of their own.
    starts = torch.cat([torch.arange(half), torch.arange(tokens - half)])[None]
    apart = torch.cat([model(ids[:, :half]).logits, model(ids[:, half:]).logits], dim=1)
    packed = model(ids, position_ids=starts)
    ones = torch.ones_like(ids)
    across = model(ids, attention_mask=ones, position_ids=starts).logits
    refused = 0
    try:
        kept = model(ids[:, :2], use_cache=True).past_key_values
        model(ids, position_ids=starts, past_key_values=kept)
    except ValueError as error:
        refused = int("cache cannot separate" in str(error))
    # The same two texts by a mask of four axes, as booleans and as floats.
    text = (torch.arange(tokens) >= half).long()
    seen = (text[:, None] == text) & torch.ones(tokens, tokens).tril().bool()
    floats = torch.zeros(1, 1, tokens, tokens).masked_fill(~seen, torch.finfo(base.dtype).min)
    few = torch.tensor([tokens - 1, 1])
    whole = model(ids, labels=ids, output_hidden_states=True)
    pieces = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert type(pieces) is tuple and len(pieces) == len(whole.to_tuple())
    mask = ones.clone()
    mask[0, :3] = 0
    grown, static = (
        greedy(model, ids, mask, 4, cache_implementation=kind) for kind in (None, "static")
    )
    headless = load(directory / "model", base.dtype, AutoModel)
    assert type(headless).__name__ == "FineRMoeModel"
    hidden = headless(ids).last_hidden_state
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    return {
        "packed": max(
            far(packed.logits, apart), far(model(ids, position_ids=starts).logits, apart)
        ),
        "packed is cached": int(packed.past_key_values is not None),
        "cached packing refused": refused,
        "across": far(across, apart),
        "4-D mask": max(
            far(model(ids, attention_mask=m, position_ids=starts).logits, apart)
            for m in (seen[None, None], floats)
        ),
        "logits_to_keep": max(
            far(model(ids, logits_to_keep=few).logits, base[:, few]),
            far(model(ids, logits_to_keep=2).logits, base[:, -2:]),
        ),
        "return_dict": max(far(pieces[0], whole.loss), far(pieces[1], whole.logits)),
        "static cache": int((static != grown).sum()),
        "AutoModel": far(model.lm_head(hidden), base),
        "every expert": every_expert(model),
        "compiled": far(compiled, base),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
    }


def every_expert(model):
    """Difference of a layer's two ways to compute its experts; compiled graphs take the second."""
    worst = 0.0
    for layer in model.modules():
        if type(layer).__name__ == "FineRMoeLayer":
            rows = torch.randn(
                9, layer.config.hidden_size, generator=torch.Generator().manual_seed(0)
            )
            chosen = layer.gate.route(layer.gate(rows))
            ways = layer.chosen_experts(rows, *chosen), layer.all_experts(rows, *chosen)
            worst = max(worst, far(*ways) / ways[0].abs().max().item())
    return worst


def checkpointing(model, ids):
    """Difference of gradients with and without activation checkpointing, and layers run twice."""

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    runs = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.train()
    wanted = gradients()
    enable = model.gradient_checkpointing_enable if OLD else model.activation_checkpointing_enable
    enable({"use_reentrant": False})
    got = gradients()
    hook.remove()
    model.eval()
    again = model(ids).logits
    disable = (
        model.gradient_checkpointing_disable if OLD else model.activation_checkpointing_disable
    )
    disable()
    assert got.keys() == wanted.keys() and torch.equal(again, model(ids).logits)
    return {"checkpointing": max(far(got[k], v) for k, v in wanted.items()), "runs": len(runs)}


def trainer(directory):
    """The losses that Trainer logs without and with activation checkpointing, and layers run.

    For one DIR, and where accelerate is installed.
    """
    if directory.name != "qwen_experts" or not find_spec("accelerate"):
        return {}
    ids = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    name = "gradient_checkpointing" if OLD else "activation_checkpointing"
    found = []
    for setting in ({}, {name: True, f"{name}_kwargs": {"use_reentrant": False}}):
        model, runs = load(directory / "model", torch.float32), []
        model.model.layers[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        arguments = transformers.TrainingArguments(
            str(directory / "trainer"),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **setting,
        )
        run = transformers.Trainer(model, arguments, train_dataset=rows)
        run.remove_callback(transformers.PrinterCallback)  # stdout is this script's report
        run.train()
        found.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        found.append(len(runs))
    return {"trainer": found}


def random_weights(directory):
    """A model of the directory's shape."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def gradient_check(model, ids, wanted):
    """Differences of the losses, and of the gradients relative to their norms."""
    out = model(ids, labels=ids, output_router_logits=True)
    loss = out.loss - model.config.router_aux_loss_coef * out.aux_loss
    loss.backward()
    gradients = {k.removeprefix("grad."): v for k, v in wanted.items() if k.startswith("grad.")}
    assert gradients
    parameters = dict(model.named_parameters())
    return {
        "loss": (loss - wanted["loss"]).abs().item(),
        "aux_loss": (out.aux_loss - wanted["aux_loss"]).abs().item(),
        "gradients": max(
            ((parameters[k].grad - v).norm() / v.norm()).item() for k, v in gradients.items()
        ),
    }


def check(directory):
    """One DIR; what it returns is in the module's docstring."""
    model = load(directory / "model", torch.float32)
    checks = {}
    for name, tensor in load_file(directory / "wanted.safetensors").items():
        case, _, kind = name.partition(".")
        whole = tensor.long() if tensor.dtype == torch.int32 else tensor
        checks.setdefault(case, {})[kind] = whole
    worst = {}

    def record(kind, value):
        worst[kind] = max(value, worst.get(kind, 0.0))

    for wanted in checks.values():
        ids = wanted["input_ids"]
        mask = wanted.get("attention_mask", torch.ones_like(ids))
        if "loss" in wanted:
            for kind, value in gradient_check(model, ids, wanted).items():
                record(kind, value)
        with torch.no_grad():
            if "logits" in wanted:
                plain = model(ids, attention_mask=mask, use_cache=False).logits
                record("logits", difference(plain, wanted["logits"], mask))
                through_cache = cached(model, ids, mask)
                record("cached", difference(through_cache, wanted["logits"], mask))
            if "sequences" in wanted:
                new = wanted["sequences"].shape[1] - ids.shape[1]
                got = greedy(model, ids, mask, new)
                record("other tokens", int((got != wanted["sequences"]).sum()))
            if "stopped" in wanted:
                got = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
                assert got.shape == wanted["stopped"].shape, (got, wanted["stopped"])
                record("stopped", int((got != wanted["stopped"]).sum()))
    with torch.no_grad():
        torch.manual_seed(0)
        sampled = model.generate(
            ids, attention_mask=mask, min_new_tokens=4, max_new_tokens=4, do_sample=True
        )
        assert sampled.shape[1] == ids.shape[1] + 4

        model.save_pretrained(directory / "again")
        again = load(directory / "again", torch.float32)
        kept = again.state_dict()
        assert all(torch.equal(kept.pop(name), t) for name, t in model.state_dict().items())
        assert not kept

        low = load(directory / "model", torch.bfloat16)
        assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
        got, wanted = low(ids, mask).logits.float(), model(ids, mask).logits
        assert got.isfinite().all()
        bfloat16 = ((got - wanted)[mask.bool()].norm() / wanted[mask.bool()].norm()).item()
    report = {
        "class": type(model).__name__,
        "remote": type(model).__module__.startswith("transformers_modules."),
        "bfloat16": bfloat16,
        **worst,
    }
    if report["remote"]:
        drawn = random_weights(directory / "model")
        assert {k: v.shape for k, v in drawn.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        report["drawn"] = drawn.model.embed_tokens.weight.std().item()
        report |= without_experts(type(model))
        with torch.no_grad():
            report |= clients(model, directory, ids)
        report |= checkpointing(model, ids) | trainer(directory)
    if (directory / "model" / "tokenizer.json").exists():
        # AutoTokenizer asks as well: it looks at config.json.
        tokenizer = AutoTokenizer.from_pretrained(directory / "model", trust_remote_code=True)
        report["text"] = tokenizer.encode("Return the")
    return report


def without_experts(model_class):
    """The exported code with dense layers only, beside transformers' own Qwen2 and Qwen3.

    Returns the largest difference of their logits; the weights are random and the same.
    """
    shape = dict(
        vocab_size=97, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=5e4, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(97, (2, 9))
    differences = {}
    for name, changes, keys in (
        ("Qwen2", {}, {}),
        ("Qwen3", dict(head_dim=10), dict(head_dim=10, qkv_bias=False, qk_norm=True)),
    ):
        config = getattr(transformers, f"{name}Config")(**shape, **changes)
        theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in theirs.parameters():  # biases and norms as well
            torch.nn.init.normal_(parameter, 0.1, 0.2)
        config = model_class.config_class(**shape, **keys, G_I=4, mlp_only_layers=[0, 1])
        ours = model_class(config).eval()
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            differences[name] = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    return differences


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {Path(name).name: check(Path(name)) for name in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, "found": found}, indent=1))
