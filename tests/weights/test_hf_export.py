"""The exported code has what vLLM and continuous batching read from it (docs/howto/serve.md).

Read as source: torch is not installed here. tests/end_to_end/serve_check.py serves it.
"""

import ast
import dataclasses
import re

import pytest
from safetensors import safe_open

from finermoe_jax.weights.hf_config import AUTO_MAP, not_in_vllm
from finermoe_jax.weights.hf_weights import model_code
from tests.support import DATA, GOLDEN, SMALL

CONFIGURATION, MODELING = (ast.parse(path.read_text()) for path in model_code())
# Weights of two axes that every device holds whole.
WHOLE = r"layers\.\d+\.mlp\.(gate|shared_expert_gate|concat_proj)"


def class_of(name):
    (found,) = (n for n in MODELING.body if isinstance(n, ast.ClassDef) and n.name == name)
    return found


def method(name, function):
    (found,) = (n for n in class_of(name).body if getattr(n, "name", None) == function)
    return found


def assigned(node):
    """Target to value of the assignments in a node, as source."""
    found = {}
    for each in ast.walk(node):
        if isinstance(each, ast.Assign):
            for target in each.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = each.value.elts if isinstance(each.value, ast.Tuple) else [each.value]
                if len(values) != len(names):
                    values = [each.value] * len(names)
                found |= dict(zip(map(ast.unparse, names), map(ast.unparse, values), strict=True))
    return found


def test_attention_is_one_call_of_the_interface():
    forward = method("FineRMoeAttention", "forward")
    looked_up = [
        name
        for name, value in assigned(forward).items()
        if value.startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    (name,) = looked_up
    (call,) = (
        n for n in ast.walk(forward) if isinstance(n, ast.Call) and ast.unparse(n.func) == name
    )
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    assert ast.unparse(call.args[0]) == "self"
    assert keywords == {"scaling": "self.scaling", None: "kwargs"}
    attributes = assigned(method("FineRMoeAttention", "__init__"))
    for attribute, value in {
        "self.config": "config",
        "self.layer_idx": "layer_idx",
        "self.scaling": "config.head_dim ** (-0.5)",
        "self.num_key_value_groups": "config.num_attention_heads // config.num_key_value_heads",
    }.items():
        assert attributes[attribute] == value
    assert assigned(class_of("FineRMoePreTrainedModel"))["_supports_attention_backend"] == "True"


@pytest.mark.parametrize("name", ["FineRMoeAttention", "FineRMoeDecoderLayer", "FineRMoeModel"])
def test_further_arguments_reach_the_attention(name):
    """The paged cache of continuous batching comes as `cache`."""
    arguments = method(name, "forward").args
    assert arguments.kwarg.arg == "kwargs"
    assert "cache" not in [a.arg for a in arguments.args]


def test_no_layer_is_replaced_that_computes_something_else():
    """vLLM replaces subclasses of nn.Linear, and an nn.ModuleList named `experts`."""
    classes = [node for node in MODELING.body if isinstance(node, ast.ClassDef)]
    assert not [c.name for c in classes if "nn.Linear" in map(ast.unparse, c.bases)]
    experts = assigned(method("FineRMoeLayer", "__init__"))["self.experts"]
    assert experts.startswith("nn.ModuleDict(")


def test_vllm_finds_the_decoder_and_loads_its_head():
    assert AUTO_MAP["AutoModel"] == "modeling_finer_moe.FineRMoeModel"
    made = ast.unparse(method("FineRMoeModel", "__init__"))
    assert "if config._attn_implementation == 'vllm':\n        self._keys_to_ignore" in made


def test_tensor_parallelism_splits_every_large_weight():
    constants = [n for n in CONFIGURATION.body if isinstance(n, ast.Assign)]
    values = {}
    exec(compile(ast.Module(constants, []), "constants", "exec"), values)
    plan = values["_TP_PLAN"]
    (config,) = (n for n in CONFIGURATION.body if isinstance(n, ast.ClassDef))
    assert assigned(config)["base_model_tp_plan"] == "_TP_PLAN"
    patterns = {re.escape(key).replace(r"\*", r"\d+"): how for key, how in plan.items()}
    used = set()
    folders = (GOLDEN / "a_base", GOLDEN / "c_go4_concatproj", DATA / "dense" / "qwen3_tied")
    names = {}
    for file in (file for folder in folders for file in folder.glob("model*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            names |= {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118
    for name, shape in names.items():
        if len(shape) < 2 or ".layers." not in name:
            continue
        layer = name.removeprefix("model.").removesuffix(".weight")
        fits = [pattern for pattern in patterns if re.fullmatch(pattern, layer)]
        assert len(fits) == (not re.fullmatch(WHOLE, layer)), name
        for pattern in fits:
            inwards = layer.endswith(("o_proj", "down_proj"))
            assert patterns[pattern] == ("rowwise" if inwards else "colwise")
        used.update(fits)
    assert used == set(patterns)


def test_an_export_says_that_vllm_has_no_such_heads():
    assert not_in_vllm(dataclasses.replace(SMALL, head_dim=32)) is None
    said = not_in_vllm(dataclasses.replace(SMALL, head_dim=24))
    assert said.startswith("vLLM on a CPU cannot serve it: head_dim=24 is not one of 32, 64, 80")
    assert said.endswith("use transformers (docs/howto/serve.md)")
