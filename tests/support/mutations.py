"""Random changes to Hugging Face directories, each repeatable by its number."""

import contextlib
import json
import os
import random
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from finermoe_jax.weights.integrity import write_checksums
from tests.support import GOLDEN

# name: source, number of shards
SOURCES = {
    "untied": (GOLDEN / "upcycle" / "dense_untied", 1),
    "tied": (GOLDEN / "upcycle" / "dense_tied", 1),
    "untied in shards": (GOLDEN / "upcycle" / "dense_untied", 3),
    "mixture": (GOLDEN / "d_noshare", 1),
    "mixture in shards": (GOLDEN / "c_go4_concatproj", 2),
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# What may stand where a number, a name or a list should.
STRANGE = [
    None, True, False, 0, -1, 1, 2, 3, 7, 48, 10**6, 2**31, 2**32 + 4, 2**40, 2**63 - 1, 2**63,
    2**64, 10**30, 10**400, -(10**30), 0.0, -0.5, 1.5, 24.0, 1e-320, 1e308, float("nan"),
    float("inf"), -float("inf"), "", "24", "a" * 5000, "\u0000", "\ud800", "ß/..", [], [[]], [0],
    [1, 0], [24] * 50, {}, {"a": {"b": []}}, "null",
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "BOOL",
          "F8_E5M2", "F8_E4M3", "F4", "C64", "f32", "", 7, None]  # fmt: skip
NAMES = [
    "", "..", ".", "../x.safetensors", "/etc/passwd", "/dev/zero", "sub/x.safetensors", SINGLE,
    INDEX, "config.json", "a\u0000b", "\ud800", "n" * 300, "model-00009-of-00002.safetensors",
]  # fmt: skip


# --- changes --------------------------------------------------------------------------------


def shards(folder):
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def parse(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def unparse(path, header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes((length % 2**64).to_bytes(8, "little") + text + body)


def flip(data, chance, start, stop, most=3):
    data = bytearray(data)
    for _ in range(chance.randint(1, most)):
        data[chance.randrange(start, stop)] ^= 1 << chance.randrange(8)
    return bytes(data)


def header_bytes(folder, chance):
    path = chance.choice(shards(folder))
    data = path.read_bytes()
    path.write_bytes(flip(data, chance, 0, 8 + int.from_bytes(data[:8], "little")))


def header_length(folder, chance):
    path = chance.choice(shards(folder))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    wrong = chance.choice([0, 1, length - 1, length + 1, length + 8, 2**63, 2**64 - 1, 10**8])
    path.write_bytes(wrong.to_bytes(8, "little") + data[8:])


def header_value(folder, chance):
    path = chance.choice(shards(folder))
    header, body = parse(path)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.sample(names, 2)
    entry = header[name]
    kind = chance.choice(["dtype", "shape", "offsets", "swap", "strange", "name", "gone", "extra"])
    if kind == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = chance.choice(
            [shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [2 * shape[0], *shape[1:]],
             [-size for size in shape], [0, *shape[1:]], [2**32, 2**32], [2**63, 2], [str(shape)],
             [float(size) for size in shape], chance.choice(STRANGE)]
        )  # fmt: skip
    elif kind == "offsets":
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = chance.choice(
            [[stop, start], [start + 4, stop + 4], [start, stop + 8], [0, 2**64], [2**63, 2**63],
             [-stop, 0], [start], [], [start, stop, stop], [str(start), stop], [0.5, stop],
             chance.choice(STRANGE)]
        )  # fmt: skip
    elif kind == "swap":
        part = chance.choice(["data_offsets", "shape", "dtype"])
        entry[part], header[other][part] = header[other][part], entry[part]
    elif kind == "strange":
        header[name] = chance.choice(STRANGE)
    elif kind == "name":
        new = chance.choice(["", name + " ", name.upper(), other, "__metadata__", "n" * 100_000,
                             name.replace(".0.", ".1000000000."), "é\u0000"])  # fmt: skip
        header[new] = header.pop(name)
    elif kind == "gone":
        del header[name]
    else:
        header["__metadata__"] = chance.choice(STRANGE)
    unparse(path, header, body)


def header_text(folder, chance):
    path = chance.choice(shards(folder))
    header, body = parse(path)
    text = json.dumps(header)
    name = chance.choice([name for name in header if name != "__metadata__"])
    again = json.dumps({name: header[chance.choice(list(header))]})[1:-1]
    entry = json.dumps(header[name])
    unparse(
        path,
        chance.choice(
            [
                text[:-1] + "," + again + "}",  # a name twice
                text.replace(entry, entry[:-1] + ',"shape":[1]}'),
                text.replace(entry, entry[:-1] + ',"more":[1]}'),
                text.replace(entry, "[" * 20_000 + "]" * 20_000),
                text + " " * chance.randrange(9),
                text + "{}",
                "\ufeff" + text,
                text.replace("[", "[NaN,", 1),
                "",
                "null",
                "[]",
            ]
        ).encode()
        if chance.random() < 0.9
        else text.encode("utf-16"),
        body,
    )


def tensor_bytes(folder, chance):
    """Another value: as good as the one before."""
    path = chance.choice(shards(folder))
    data = path.read_bytes()
    path.write_bytes(flip(data, chance, 8 + int.from_bytes(data[:8], "little"), len(data), 50))


def file_length(folder, chance):
    path = chance.choice([*shards(folder), *folder.glob("*.json")])
    data = path.read_bytes()
    more = chance.choice([b"\0", b"}", b"\0" * 4096, None])
    path.write_bytes(data + more if more else data[: chance.randrange(len(data))])


def tensors(folder, chance):
    """Changes that save_file writes down as they are."""
    path = chance.choice(shards(folder))
    values = load_file(path)
    name, other = chance.sample(sorted(values), 2)
    kind = chance.choice(
        [
            "special",
            "special",
            "rename",
            "remove",
            "add",
            "cast",
            "cast all",
            "shape",
            "swap",
            "cut",
        ]
    )
    tensor = values[name].copy()
    if kind == "special":
        where = tuple(chance.randrange(size) for size in tensor.shape)
        tensor[where] = chance.choice([np.nan, np.inf, -np.inf, -0.0, 1e30, 1e-40])
    elif kind == "cast":
        tensor = tensor.astype(chance.choice(["f2", "f4", "f8", "i4", "u1", "bfloat16", "?"]))
    elif kind == "cast all":
        dtype = chance.choice(["float16", "float32", "bfloat16", "float64"])
        values = {each: value.astype(dtype) for each, value in values.items()}
        tensor = values[name]
    elif kind == "shape":
        tensor = chance.choice([tensor.T, tensor.reshape(-1), tensor[None], tensor.ravel()[0]])
    elif kind == "cut":
        tensor = tensor[: chance.randrange(len(tensor))]
    values[name] = np.ascontiguousarray(tensor)
    if kind == "swap":
        values[name], values[other] = values[other], values[name]
    elif kind == "remove":
        del values[name]
    elif kind == "rename":
        values[chance.choice([name + "s", "transformer." + name, "lm_head.weight", other])] = (
            values.pop(name)
        )
    elif kind == "add":
        values[chance.choice(["lm_head.weight", "model.layers.9.mlp.up_proj.weight", "x",
                              "model.layers.0.rotary_emb.inv_freq"])] = values[other]  # fmt: skip
    save_file(values, path)


def index(folder, chance):
    path = folder / INDEX
    if not path.exists():
        places = {name: file.name for file in shards(folder) for name in load_file(file)}
        path.write_text(json.dumps({"weight_map": places}))
        if chance.random() < 0.3:
            return
    values = json.loads(path.read_text())
    places = values["weight_map"]
    name = chance.choice(sorted(places))
    kind = chance.choice(["bytes", "place", "place", "gone", "new", "all", "whole", "metadata"])
    if kind == "bytes":
        path.write_bytes(flip(path.read_bytes(), chance, 0, path.stat().st_size))
        return
    if kind == "place":
        places[name] = chance.choice([*NAMES, *STRANGE, *places.values()])
    elif kind == "gone":
        del places[name]
    elif kind == "new":
        places[chance.choice(["x", "", "\ud800"])] = chance.choice([places[name], *NAMES])
    elif kind == "all":
        values["weight_map"] = dict.fromkeys(places, chance.choice(NAMES))
    elif kind == "metadata":
        values["metadata"] = chance.choice(STRANGE)
    else:
        values = chance.choice([*STRANGE, {"weight_map": chance.choice(STRANGE)}])
    path.write_text(json.dumps(values))


def config_values(folder, chance):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        key = chance.choice(sorted(values))
        kind = chance.choice(["strange", "strange", "double", "gone", "extra", "lists"])
        if kind == "strange":
            values[key] = chance.choice(STRANGE)
        elif kind == "double" and isinstance(values[key], (int, float)):
            values[key] = type(values[key])(values[key] * chance.choice([0.5, 2, 3, -1]))
        elif kind == "gone":
            del values[key]
        elif kind == "lists":
            values["mlp_only_layers"] = chance.choice([[0], [1], [True], [-1], [10**30], [0] * 500])
        else:
            extra = ["head_dim", "rope_parameters", "rope_scaling", "qkv_bias", "mlp_bias",
                     "attention_bias", "unheard_of", "use_sliding_window"]  # fmt: skip
            values[chance.choice(extra)] = chance.choice(
                [*STRANGE, 6, 16, {"rope_theta": chance.choice(STRANGE)}, {"rope_type": "yarn"}]
            )
    path.write_text(json.dumps(values))


def config_text(folder, chance):
    path = folder / "config.json"
    text = path.read_text()
    if chance.random() < 0.5:
        path.write_bytes(flip(path.read_bytes(), chance, 0, path.stat().st_size, 2))
        return
    size = json.loads(text)["hidden_size"]
    digits = f'"hidden_size": {size}'
    path.write_text(
        chance.choice(
            [text.replace(digits, digits + "0" * 5000), text.replace(digits, digits + ".0"),
             text.replace(digits, digits + ', "hidden_size": 48'), "[" * 100_000,
             text.replace(digits, '"hidden_size": 48, ' + digits), "\ufeff" + text, text * 2,
             json.dumps(chance.choice(STRANGE))]
        )
    )  # fmt: skip


def files(folder, chance):
    names = [path.name for path in [*shards(folder), *folder.glob("*.json")]]
    path = folder / chance.choice(names)
    kind = chance.choice(["empty", "directory", "fifo", "moved", "dangling", "loop", "gone", "huge",
                          "/dev/zero", "/dev/null", "/dev/tty", "swapped", "copied"])  # fmt: skip
    data = path.read_bytes()
    if kind == "copied":
        shutil.copyfile(path, folder / "more.safetensors")
        return
    if kind == "swapped":
        other = folder / chance.choice(names)
        held = other.read_bytes()
        other.write_bytes(data)
        path.write_bytes(held)
        return
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as stream:  # without blocks on the disk
            stream.write(data[: chance.randrange(len(data))])
            stream.truncate(1 << 40)
    elif kind == "moved":  # as in the hub's cache
        elsewhere = folder.with_name(f"{folder.name}-{path.name}")
        elsewhere.write_bytes(data)
        path.symlink_to(elsewhere)
    elif kind != "gone":
        path.symlink_to({"dangling": "nowhere", "loop": path.name}.get(kind, kind))


CHANGES = [header_bytes, header_length, header_value, header_value, header_text, tensor_bytes,
           file_length, tensors, tensors, index, config_values, config_values, config_values,
           config_text, files]  # fmt: skip


def changed(number, folder):
    """The source of one case, and what was done to it."""
    chance = random.Random(f"case {number}")
    source, count = SOURCES[name := chance.choice(sorted(SOURCES))]
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    if count > 1:
        values = {k: v for file in sorted(source.glob("model*.safetensors")) for k, v in
                  load_file(file).items()}  # fmt: skip
        parts = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        places = {name: parts[i % count] for i, name in enumerate(sorted(values))}
        for part in parts:
            save_file({k: values[k] for k in places if places[k] == part}, folder / part)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        shutil.copyfile(source / SINGLE, folder / SINGLE)
    done = [name]
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        change = chance.choice(CHANGES)
        # Of several changes a later one may find nothing left to work on.
        with contextlib.suppress(Exception) if len(done) > 1 else contextlib.nullcontext():
            change(folder, chance)
        done.append(change.__name__)
        if change is files:  # a later change might read what is endless
            break
    return done


def damaged(number, checkpoint):
    """Changes one or two files of a checkpoint of ours; returns what was done.

    In every second case the checksums are made to agree, as whoever wrote it so would have.
    """
    chance = random.Random(f"checkpoint {number}")
    done = []
    for _ in range(chance.choice([1, 1, 2])):
        # Orbax draws the names of its files.
        names = [path for path in checkpoint.rglob("*") if path.is_file()]
        names.sort(key=lambda path: (str(path.parent), path.stat().st_size, path.name))
        texts = [path for path in names if path.name in ("metadata", "_METADATA", "_sharding")
                 or path.name.startswith("array_metadatas")]  # fmt: skip
        kind = chance.choice(["flip", "flip", "cut", "gone", "empty", "directory", "fifo", "json",
                              "json", "json", "swap"])  # fmt: skip
        path = chance.choice(texts if kind == "json" else names)
        data = path.read_bytes()
        done.append((kind, str(path.relative_to(checkpoint))))
        if kind == "flip" and data:
            path.write_bytes(flip(data, chance, 0, len(data)))
        elif kind == "cut" and data:
            path.write_bytes(data[: chance.randrange(len(data))])
        elif kind == "swap":
            other = chance.choice(names)
            path.write_bytes(other.read_bytes())
            other.write_bytes(data)
        elif kind == "json":
            try:
                values = json.loads(data)
            except ValueError:  # changed before
                continue
            path.write_text(json.dumps(strange(values, chance)))
        elif kind in ("gone", "directory", "fifo"):
            path.unlink()
            if kind == "directory":
                path.mkdir()
            elif kind == "fifo":
                os.mkfifo(path)
        else:
            path.write_bytes(b"")
    if number % 2:
        done.append("checksums agree")
        place = checkpoint / "checksums.json"
        if place.is_dir():
            place.rmdir()
        elif place.is_fifo():
            place.unlink()
        write_checksums(checkpoint)
    return done


def strange(values, chance):
    """A JSON value with one place in it replaced, removed or renamed."""
    if not isinstance(values, (dict, list)) or not values or chance.random() < 0.1:
        return chance.choice(STRANGE)
    key = (
        chance.choice(sorted(values)) if isinstance(values, dict) else chance.randrange(len(values))
    )
    if isinstance(values, dict) and chance.random() < 0.1:
        values[key + "s"] = values.pop(key)
    elif chance.random() < 0.1:
        del values[key]
    else:
        values[key] = strange(values[key], chance)
    return values
