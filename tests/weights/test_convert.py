"""Conversion of what random changes have made of a source: refused with a message, or right.

The right result is read here a second time, with safetensors' own reader and names written out.
"""

import contextlib
import gc
import json
import resource
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.hf_weights import open_hf
from finermoe_jax.weights.source import open_model
from finermoe_jax.weights.upcycle import upcycle_weights
from tests.support.mutations import INDEX, SINGLE, SOURCES, changed, damaged

MOE = fm.MoEConfig(4, 2, 1, 2, 1)
CASES, BATCHES, SECONDS, DAMAGED = 500, 5, 30, 40


# --- the second reading ---------------------------------------------------------------------


def read_again(folder):
    """config.json and every tensor of a directory."""
    files = [folder / SINGLE]
    if (folder / INDEX).exists():
        places = json.loads((folder / INDEX).read_text())["weight_map"]
        files = [folder / name for name in sorted(set(places.values()))]
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text(encoding="utf-8-sig")), tensors


def expected_layer(values, tensors, layer, moe):
    """One layer's parameters by our names; moe is (G_I, G_O, R_I, R_O) of a mixture's layer."""
    at = f"model.layers.{layer}."
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = values.get("head_dim") or hidden // heads
    result = {
        "input_norm/scale": tensors[at + "input_layernorm.weight"],
        "post_norm/scale": tensors[at + "post_attention_layernorm.weight"],
        "attention/out": tensors[at + "self_attn.o_proj.weight"].reshape(hidden, heads, head_dim),
    }
    for ours, name, count in (
        ("query", "q", heads),
        ("key", "k", kv_heads),
        ("value", "v", kv_heads),
    ):
        weight = tensors[f"{at}self_attn.{name}_proj.weight"]
        result[f"attention/{ours}"] = weight.reshape(count, head_dim, hidden)
        if f"{at}self_attn.{name}_proj.bias" in tensors:
            bias = tensors[f"{at}self_attn.{name}_proj.bias"]
            result[f"attention/{ours}_bias"] = bias.reshape(count, head_dim)
    if moe is None:
        for part in ("gate", "up", "down"):
            result[f"mlp/{part}"] = tensors[f"{at}mlp.{part}_proj.weight"]
        return result
    g_i, g_o, r_i, r_o = moe
    gate_up, down = [], []
    for expert in range(g_i * g_o * r_i * r_o):
        e = f"{at}mlp.experts.{expert}."
        gate, up = tensors[e + "gate_proj.weight"], tensors[e + "up_proj.weight"]
        gate_up.append([*gate, *up])
        down.append(tensors[e + "down_proj.weight"].T)
    result["moe/gate_up"], result["moe/down"] = np.array(gate_up), np.array(down)
    result["moe/router"] = tensors[at + "mlp.gate.weight"]
    if values.get("shared_expert_intermediate_size"):
        for part in ("gate", "up", "down"):
            result[f"moe/shared/{part}"] = tensors[f"{at}mlp.shared_expert.{part}_proj.weight"]
        result["moe/shared_gate"] = tensors[at + "mlp.shared_expert_gate.weight"][0]
    if values.get("moe_concat_proj"):
        result["moe/concat_proj"] = tensors[at + "mlp.concat_proj.weight"]
    return result


def upcycled_layer(dense):
    """A dense layer's parameters as MOE's, without what is drawn."""
    result = {name: value for name, value in dense.items() if not name.startswith("mlp/")}
    gate, up, down = (dense[f"mlp/{part}"] for part in ("gate", "up", "down"))
    for part in ("gate", "up", "down"):
        result[f"moe/shared/{part}"] = dense[f"mlp/{part}"]
    wide, wide_out = gate.shape[0] // 4, down.shape[0] // 2
    gate_up, downs = [], []
    for slot in range(2):
        for _candidate in range(2):
            for piece in range(4):
                rows = range(piece * wide, (piece + 1) * wide)
                outputs = range(slot * wide_out, (slot + 1) * wide_out)
                gate_up.append([gate[row] for row in rows] + [up[row] for row in rows])
                downs.append([[down[out, row] for out in outputs] for row in rows])
    return result | {"moe/gate_up": np.array(gate_up), "moe/down": np.array(downs)}


def assert_right(values, tensors, config, arrays, upcycled=False):
    """`arrays`, by path, hold what the tensors do; config what the values do."""
    dtype = tensors["model.embed_tokens.weight"].dtype
    mixture = values["model_type"] == "finer_moe"
    layers = []
    for layer in range(values["num_hidden_layers"]):
        step = values.get("decoder_sparse_step", 1)
        sparse = mixture and layer not in (values.get("mlp_only_layers") or [])
        sparse = sparse and (layer + 1) % step == 0
        numbers = tuple(values[key] for key in ("G_I", "G_O", "R_I", "R_O")) if sparse else None
        mine = expected_layer(values, tensors, layer, numbers)
        layers.append(upcycled_layer(mine) if upcycled else mine)
    wanted = {
        "embed/weight": tensors["model.embed_tokens.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
    }
    tied = values.get("tie_word_embeddings", False)
    if upcycled or not tied:
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        wanted["lm_head/weight"] = tensors[head]
    drawn = ("moe/router", "moe/shared_gate") if upcycled else ()
    # Layers lie in runs[r][p], stacked over the repeats of the run's pattern.
    runs = {path[1:3] for path in arrays if path[0] == "runs"}
    layer = 0
    for run in sorted({run for run, _ in runs}):
        period = 1 + max(place for number, place in runs if number == run)
        repeats = len(arrays["runs", run, 0, "input_norm", "scale"])
        for repeat in range(repeats):
            for place in range(period):
                for name, value in layers[layer].items():
                    wanted[f"runs/{run}/{place}/{name}", repeat] = value
                layer += 1
    assert layer == len(layers)
    for path, array in arrays.items():
        name = "/".join(map(str, path))
        assert array.dtype == dtype
        parts = [(name, array)]
        if path[0] == "runs":
            if "/".join(path[3:]) in drawn:
                assert np.isfinite(array.astype(np.float32)).all()
                continue
            parts = [((name, repeat), array[repeat]) for repeat in range(len(array))]
        for key, part in parts:
            right = wanted.pop(key)
            assert part.shape == right.shape, key
            with np.errstate(invalid="ignore"):  # signalling NaN
                assert part.tobytes() == right.astype(dtype).tobytes(), key
            # Nothing has become infinite on the way to another dtype.
            assert np.array_equal(np.isinf(part), np.isinf(right)), key
    assert not wanted
    rope = [values.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    assert not {k for said in rope for k in said} - {"rope_theta", "rope_type", "type"}
    assert config.rope_scaling is None
    theta = [said["rope_theta"] for said in (values, *rope) if said.get("rope_theta") is not None]
    assert {config.rope_theta} == set(theta or [10000])
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                "head_dim", "rms_norm_eps"):  # fmt: skip
        if values.get(key) is not None:
            assert getattr(config, key) == values[key], key


# --- the cases ------------------------------------------------------------------------------


class Hang(BaseException):
    """No exception that anyone catches as another."""


@contextlib.contextmanager
def limited(seconds):
    """Raises where a case takes longer: reading a pipe that nobody writes never ends."""

    def stop(number, frame):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder, done):
    """The message of a source that is refused; None for one whose weights are all right."""
    try:
        with limited(SECONDS):
            config, weights = open_hf(folder)
            arrays = {path: array[:] for path, array in weights.items()}
            upcycled = None
            if config.moe is None:
                upcycled = upcycle_weights(config, weights, MOE, jax.random.key(1))
                upcycled = (upcycled[0], {path: array[:] for path, array in upcycled[1].items()})
    except fm.InputError as error:
        message = str(error)
        assert len(message) > 20 and "Traceback" not in message, (done, message)
        return message
    again = read_again(folder)
    assert_right(*again, config, arrays)
    if upcycled is not None:
        assert_right(*again, *upcycled, upcycled=True)
    return None


@pytest.mark.nightly
@pytest.mark.parametrize("batch", range(BATCHES))
def test_changed_sources_are_refused_or_right(tmp_path, batch):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, accepted = [], 0
    for number in range(batch, CASES, BATCHES):
        folder, target = tmp_path / str(number), tmp_path / f"{number}-target"
        done = [number]
        done += changed(number, folder)
        try:
            message = outcome(folder, done)
            if message is not None:
                refused.append(message)
                with limited(SECONDS), pytest.raises(fm.InputError):
                    convert(str(folder), target, "orbax", MOE, seed=1)
            else:
                accepted += 1
                if accepted % 4 == 1:  # all have been read and upcycled in memory
                    converted(folder, target)
            assert not target.exists() and not list(tmp_path.glob(".*")), "something is left"
        except BaseException as error:
            error.add_note(f"case {done}")
            raise
        for path in tmp_path.glob(f"{number}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert accepted >= 15 and len(refused) >= 50, (accepted, len(refused))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 1024, f"{grown} MiB more memory"


def converted(folder, target):
    """A checkpoint on the disk holds the same, and is taken away again."""
    values, tensors = read_again(folder)
    dtype = None
    if len({tensor.dtype for name, tensor in tensors.items() if "inv_freq" not in name}) > 1:
        with pytest.raises(fm.InputError, match="choose it with --dtype"):
            convert(str(folder), target, "orbax", MOE, seed=1)
        dtype = str(tensors["model.embed_tokens.weight"].dtype)
    with limited(3 * SECONDS):
        convert(str(folder), target, "orbax", MOE, seed=1, dtype=dtype)
        model = fm.load_checkpoint(target)
    arrays = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model)))
    arrays = {path: np.asarray(array) for path, array in arrays.items()}
    dense = values["model_type"] != "finer_moe"
    assert_right(values, tensors, model.config, arrays, upcycled=dense)
    shutil.rmtree(target)


# --- damaged checkpoints ----------------------------------------------------------------------


def values_of(model):
    arrays = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model)))
    return {path: np.asarray(array).tobytes() for path, array in arrays.items()}


def read_lazily(checkpoint):
    source = open_model(checkpoint)
    return {path: array[:].tobytes() for path, array in source.weights.items()}


# Reads of a checkpoint that Orbax cuts off when one of them fails, and drops unfinished.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.nightly
def test_damaged_checkpoints_are_refused_or_right(tmp_path):
    convert(str(SOURCES["tied"][0]), tmp_path / "whole", "orbax", MOE, seed=1)
    whole = values_of(fm.load_checkpoint(tmp_path / "whole"))
    refused = accepted = 0
    for number in range(DAMAGED):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        done = [number, *damaged(number, folder)]
        try:
            found = []
            for read in (read_lazily, lambda path: values_of(fm.load_checkpoint(path))):
                try:
                    with limited(SECONDS):
                        found.append(read(folder))
                    accepted += 1
                except fm.InputError as error:
                    assert len(str(error)) > 20 and "Traceback" not in str(error)
                    refused += 1
                    continue
                if "checksums agree" not in done:
                    assert found[-1] == whole
            assert len(found) < 2 or found[0] == found[1]
            if number % 10 == 0 and not found:
                with limited(SECONDS), pytest.raises(fm.InputError):
                    convert(str(folder), tmp_path / "target", "hf", None, seed=1)
            assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".*"))
        except BaseException as error:
            error.add_note(f"case {done}")
            raise
        shutil.rmtree(folder)
    gc.collect()  # what they leave is reported here, not in another test
    assert accepted >= 10 and refused >= 20, (accepted, refused)
