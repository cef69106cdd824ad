"""Lazy arrays, and the files that they are written to and read from."""

import dataclasses
import json
import math
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import finermoe_jax as fm
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.layers import sharding
from finermoe_jax.layers.parameters import Kind
from finermoe_jax.model.decoder import Decoder, parameter_shapes, with_shapes
from finermoe_jax.weights import integrity, lazy
from finermoe_jax.weights import orbax_files as lazy_checkpoint
from finermoe_jax.weights import safetensors_files as tensor_files
from finermoe_jax.weights.checkpoint import write_checkpoint
from finermoe_jax.weights.hf_names import parts
from finermoe_jax.weights.integrity import write_checksums
from finermoe_jax.weights.safetensors_files import Entry, write_tensors
from finermoe_jax.weights.source import open_model, read_model
from tests.support import SMALL

MOE = fm.MoEConfig(4, 2, 1, 2, 1)
SHAPES = st.lists(st.integers(1, 12), max_size=4).map(tuple)


class Counted:
    """A function that notes what it was asked."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, argument):
        self.asked.append(argument)
        return self.function(argument)


def counted(values, asked):
    """A LazyArray that notes how many values it was asked for."""

    def read(index):
        asked.append(values[index].size)
        return values[index]

    return lazy.LazyArray(values.shape, values.dtype, read)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SHAPES, st.sampled_from([64, 1000, 1 << 20]), st.sampled_from(["f4", "f2"]))
def test_blocks_cover_every_value_once(shape, most, dtype):
    asked = []
    array = counted(np.zeros(shape, dtype), asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", most)
        block = lazy.block_shape(array)
    seen = np.zeros(shape, int)
    for index in lazy.blocks(shape, block):
        seen[index] += 1
        assert array[index].shape == seen[index].shape
    assert (seen == 1).all()
    assert max(asked) * array.dtype.itemsize <= max(most, array.dtype.itemsize)
    # No more blocks than four times what that size needs, and the ends of axes.
    assert len(asked) <= 4 * math.ceil(array.nbytes / most) * 2 ** len(shape)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SHAPES, st.data())
def test_indexing_is_numpys(shape, data):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    bound = st.none() | st.integers(-15, 15)
    index = tuple(
        slice(data.draw(bound), data.draw(bound))
        for _ in range(data.draw(st.integers(0, len(shape))))
    )
    array = lazy.of_array(values)
    np.testing.assert_array_equal(array[index], values[index], strict=True)
    if shape:
        place = data.draw(st.integers(0, shape[0] - 1))
        np.testing.assert_array_equal(array.row(place)[index[1:]], values[place][index[1:]])
    narrow = lazy.cast({("a",): array}, "bfloat16", {("a",): Kind("attention")})["a",]
    assert narrow[index].dtype == ml_dtypes.bfloat16 and narrow.nbytes == array.nbytes // 2
    np.testing.assert_array_equal(narrow[index], values[index].astype(ml_dtypes.bfloat16))


def test_the_table_of_names_by_hand():
    config = SMALL.__class__(**{**vars(SMALL), "moe": MOE, "num_hidden_layers": 3})
    shapes = parameter_shapes(config)
    table = parts(config, list(shapes))
    named = [pair for path, where in table.items() for pair in where.shapes(shapes[path])]
    names = dict(named)
    assert len(names) == len(named) == sum(where.count for where in table.values())
    d, wide = config.hidden_size, config.intermediate_size
    assert names["model.layers.2.mlp.experts.15.up_proj.weight"] == (wide // 4, d)
    assert names["model.layers.0.mlp.experts.0.down_proj.weight"] == (d // 2, wide // 4)
    assert names["model.layers.1.mlp.shared_expert_gate.weight"] == (1, d)
    assert names["model.layers.1.mlp.gate.weight"] == (16, d)
    kv = config.num_key_value_heads * config.attention_head_dim
    assert names["model.layers.1.self_attn.v_proj.weight"] == (kv, d)
    assert names["lm_head.weight"] == names["model.embed_tokens.weight"] == (config.vocab_size, d)
    assert len(names) == 3 * (9 + 16 * 3 + 1 + 3 + 1) + 3 - config.tie_word_embeddings
    total = sum(math.prod(shape) for shape in shapes.values())
    assert sum(math.prod(shape) for shape in names.values()) == total
    # Whatever the view, an expert's tensors are apart from each other and fill the parameter.
    for path, where in table.items():
        leading = bool(where.layers) + bool(where.experts)
        whole = np.zeros(shapes[path][leading:], int)
        for rule in where.rules:
            rule.view(whole)[...] += 1
        assert (whole == 1).all(), path


@pytest.mark.parametrize("most", [1, 100, 1 << 30])
def test_files_are_what_safetensors_reads(tmp_path, monkeypatch, most):
    monkeypatch.setattr(tensor_files, "_SHARD_BYTES", most)
    monkeypatch.setattr(tensor_files, "_FLUSH_BYTES", 50)
    rng = np.random.default_rng(0)
    sizes = {"a": (3, 5), "é": (1,), "c.weight": (4, 4), "empty": (0, 7), "scalar": (), "z": (64,)}
    dtypes = ["float32", "bfloat16", "float16"] * 2
    tensors = {
        n: rng.normal(size=s).astype(d) for (n, s), d in zip(sizes.items(), dtypes, strict=True)
    }
    entries = [Entry(name, value.shape, value.dtype) for name, value in tensors.items()]
    pieces = [
        (name, piece)
        for name, value in tensors.items()
        if value.size
        for piece in (np.split(value, len(value)) if value.ndim else [value])
    ]
    assert sum(write_tensors(tmp_path, entries, pieces)) == sum(e.nbytes for e in entries)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1: 5, 100: 2, 1 << 30: 1}[most], files
    found = [(file.name, *item) for file in files for item in load_file(file).items()]
    assert len(found) == len(tensors)
    for _, name, value in found:
        np.testing.assert_array_equal(value, tensors[name], strict=True)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, name, _ in found}


def test_files_hashed_while_others_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "_RESTED", 0.05)
    contents = {"0/whole": b"1" * 3_000_000, "0/d/grown": b"22", "0/late": b"333"}
    monkeypatch.setattr(integrity, "_hash", counted_hash := Counted(integrity._hash))
    with integrity.hash_while_written(tmp_path / "1") as known:
        (tmp_path / "1" / "0" / "d").mkdir(parents=True)
        for name in ("0/whole", "0/d/grown"):
            (tmp_path / "1" / name).write_bytes(contents[name])
        deadline = time.monotonic() + 20
        while len(known) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(known) == 2
    # The directory's items get their names, and one file its end, only now.
    (tmp_path / "1" / "0").rename(tmp_path / "1" / "params")
    with (tmp_path / "1" / "params" / "d" / "grown").open("ab") as file:
        file.write(b"4")
    (tmp_path / "1" / "params" / "late").write_bytes(contents["0/late"])
    write_checksums(tmp_path / "1", known)
    assert [path.name for path in counted_hash.asked].count("whole") == 1
    assert [path.name for path in counted_hash.asked].count("grown") == 2
    stated = json.loads((tmp_path / "1" / integrity.CHECKSUMS).read_text())["files"]
    assert stated == {
        "params/whole": [3_000_000, xxhash.xxh3_128_hexdigest(contents["0/whole"])],
        "params/d/grown": [3, xxhash.xxh3_128_hexdigest(b"224")],
        "params/late": [3, xxhash.xxh3_128_hexdigest(b"333")],
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A decoder's weights, and the checkpoint that was written of them block by block."""
    config = SMALL.__class__(**{**vars(SMALL), "moe": MOE})
    model = Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    weights = lazy.of_params(nnx.to_pure_dict(nnx.state(model)))
    target = tmp_path_factory.mktemp("written") / "checkpoint"
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", 1 << 12)
        write_checkpoint(config, "float32", weights, target, None, told.append)
    assert len(told) > 2 * len(weights)
    assert sum(told) == sum(array.nbytes for array in weights.values())
    return config, {path: array[:] for path, array in weights.items()}, target


@pytest.mark.slow
def test_orbax_itself_restores_what_was_written(written):
    _, weights, target = written
    with ocp.StandardCheckpointer() as checkpointer:
        plain = nnx.traversals.flatten_mapping(checkpointer.restore(target / "params"))
    assert {tuple(map(str, path)) for path in plain} == {tuple(map(str, p)) for p in weights}
    plain = {tuple(map(str, path)): array for path, array in plain.items()}
    for path, array in weights.items():
        np.testing.assert_array_equal(plain[tuple(map(str, path))], array, strict=True)


@pytest.mark.parametrize("axes", [dict(fsdp=2, expert=4), dict(data=2, tensor=2, fsdp=2)])
def test_restored_onto_any_mesh(written, axes):
    config, weights, target = written
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, **axes}))
    model = fm.load_checkpoint(target, mesh=mesh)
    wanted, _ = sharding.param_shardings(with_shapes(config), mesh)
    wanted = nnx.traversals.flatten_mapping(wanted)
    arrays = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model)))
    assert arrays.keys() == weights.keys()
    for path, array in arrays.items():
        assert array.sharding.is_equivalent_to(wanted[path], array.ndim), path
        assert array.tobytes() == weights[path].tobytes(), path
    split = [path for path, array in arrays.items() if not array.is_fully_replicated]
    assert any(path[-1] == "gate_up" for path in split)


def test_placing_reads_each_devices_part_alone(written):
    config, weights, _ = written
    mesh = sharding.make_mesh(MeshConfig(data=1, expert=8))
    shardings, _ = sharding.param_shardings(with_shapes(config), mesh)
    asked = {path: [] for path in weights}
    lazily = {path: counted(value, asked[path]) for path, value in weights.items()}
    placed = nnx.traversals.flatten_mapping(lazy.placed(lazily, shardings))
    for path, array in placed.items():
        assert np.asarray(array).tobytes() == weights[path].tobytes()
    experts = next(path for path in weights if path[-1] == "gate_up")
    assert asked[experts] == [weights[experts].size // 8] * 8
    assert jax.device_count() == 8


def test_one_expert_is_read_without_the_others(tmp_path):
    """Counted by the kernel: bytes that the process's reads returned."""

    def received():
        return int(Path("/proc/self/io").read_text().split()[1])

    config = SMALL.__class__(**{**vars(SMALL), "moe": MOE})
    shapes = parameter_shapes(config) | {("embed", "weight"): (16, 1 << 16)}
    weights = {p: lazy.of_array(np.ones(shape, np.float32)) for p, shape in shapes.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", 1 << 18)
        write_checkpoint(config, "float32", weights, tmp_path / "checkpoint", None)
    table = lazy_checkpoint.read(tmp_path / "checkpoint" / "params", shapes)["embed", "weight"]
    before = received()
    assert table[3:5].shape == (2, 1 << 16)
    assert 2 << 18 <= received() - before < 4 << 18 < table.nbytes / 3


def test_too_little_memory_is_not_called_damage(written):
    _, _, target = written

    def read(index):
        raise MemoryError

    source = open_model(target)
    path = ("embed", "weight")
    source.weights[path] = dataclasses.replace(source.weights[path], read=read)
    with pytest.raises(fm.InputError, match="do not fit the memory of this machine"):
        read_model(source, target)
    # A message of our own is left as it is.
    narrow = open_model(target, "float16")
    narrow.weights[path] = dataclasses.replace(
        narrow.weights[path], read=lambda index: np.full(narrow.weights[path].shape, 1e9)
    )
    with pytest.raises(fm.InputError, match="array holds 1000000000"):
        read_model(narrow, target)
