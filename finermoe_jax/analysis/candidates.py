"""Config changes that may make a train step fit in memory.

Changes that keep the training's arithmetic come first. Each is tried alone, then cumulatively.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from finermoe_jax.analysis.topology import Target
from finermoe_jax.config.presets import LEAN_STATE
from finermoe_jax.config.run import RunConfig
from finermoe_jax.errors import InputError
from finermoe_jax.layers import sharding


def _train(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


def _fsdp(config: RunConfig, target: Target) -> RunConfig | None:
    mesh = dict(sharding.make_mesh(config.mesh, target.devices).shape)
    if mesh["data"] == target.slices:
        return None
    mesh["fsdp"] *= mesh["data"] // target.slices
    mesh["data"] = target.slices
    return dataclasses.replace(config, mesh=type(config.mesh)(**mesh))


def _accumulate(config: RunConfig, target: Target) -> RunConfig | None:
    parts = sharding.batch_parts(sharding.make_mesh(config.mesh, target.devices))
    count = config.data.global_batch_size // parts
    if count <= config.train.grad_accumulation or config.data.global_batch_size % count:
        return None
    return _train(config, grad_accumulation=count)


def _loss(config: RunConfig, target: Target) -> RunConfig | None:
    rows = config.data.global_batch_size // config.train.grad_accumulation
    chunk = max(rows, config.train.loss_chunk_tokens // 4)
    smaller = chunk < config.train.loss_chunk_tokens
    return _train(config, loss_chunk_tokens=chunk) if smaller else None


def _moments(config: RunConfig, target: Target) -> RunConfig | None:
    if config.optimizer.name == "adafactor" or config.optimizer.moment_dtype == "bfloat16":
        return None
    changed = dataclasses.replace(config.optimizer, moment_dtype="bfloat16")
    return dataclasses.replace(config, optimizer=changed)


def _lean(config: RunConfig, target: Target) -> RunConfig | None:
    changed = {
        group: dataclasses.replace(getattr(config, group), **values)
        for group, values in LEAN_STATE.items()
    }
    lean = dataclasses.replace(config, **changed)
    return None if lean == config else lean


def _shorter(config: RunConfig, target: Target) -> RunConfig | None:
    if config.data.sequence_length <= 2048:
        return None
    data = dataclasses.replace(config.data, sequence_length=2048)
    return dataclasses.replace(config, data=data)


# Each change's name and function on a config; the function returns None if it has no effect.
LADDER: dict[str, Callable[[RunConfig, Target], RunConfig | None]] = {
    "train.remat=full": lambda config, target: (
        None if config.train.remat == "full" else _train(config, remat="full")
    ),
    "mesh.data to mesh.fsdp": _fsdp,
    "train.grad_accumulation up to one sequence per device": _accumulate,
    "train.loss_chunk_tokens to a quarter": _loss,
    "optimizer.moment_dtype=bfloat16": _moments,
    "optimizer.name=adafactor with train.param_dtype=bfloat16": _lean,
    "data.sequence_length=2048": _shorter,
}


def combinations(config: RunConfig, target: Target) -> Iterator[tuple[str, RunConfig]]:
    """Yields each change alone, in LADDER's order, then all changes up to each."""
    for flag, change in LADDER.items():
        if (changed := change(config, target)) is not None:
            yield flag, changed
    names: list[str] = []
    for flag, change in LADDER.items():
        if (changed := change(config, target)) is not None:
            config = changed
            names.append(flag)
            if len(names) > 1:
                yield " + ".join(names), config


def search(
    config: RunConfig,
    target: Target,
    abstract_program: Callable[[RunConfig, Target], Any],
    compile_program: Callable[..., dict[str, Any]] | None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Prints and returns the changes, with the bytes of state and gradients after each.

    The bytes follow from shapes (programs.abstract_program), without activations and compiler
    buffers. With aot.compile_program, changes that leave room are compiled, in order, until one
    fits.
    """
    limit = target.chip.memory
    rows: list[dict[str, Any]] = []
    say("\nchanges in the order tried, with GiB of state and gradients only, from shapes:")
    for name, changed in combinations(config, target):
        try:
            step = abstract_program(changed, target)
        except InputError:
            continue  # this mesh cannot split the batch
        floor = step.state_bytes + step.gradient_bytes
        row: dict[str, Any] = {"change": name, "floor_bytes": floor, "possible": floor < limit}
        rows.append(row)
        verdict = "leaves room" if row["possible"] else "too much"
        if compile_program and row["possible"]:
            try:
                result = compile_program(step, target, say=lambda _: None)
                row |= {"compiled_bytes": result["peak_bytes"], "fits": result["fits"]}
                verdict = "FITS" if row["fits"] else "does not fit"
                verdict += f", compiled: {row['compiled_bytes'] / 2**30:.2f} GiB"
            except InputError as error:
                row["error"] = str(error)
                verdict = "does not compile"
        say(f"  {floor / 2**30:9.2f}  {verdict:<12}  {name}")
        if row.get("fits"):
            say(f"the first change that fits: {name}")
            return rows
    first = next((row["change"] for row in rows if row["possible"]), None)
    if compile_program or first is None:
        say("none of these fits: use a larger slice, or devices with more memory")
    else:
        say(f"--suggest compiles those that leave room, starting with: {first}")
    return rows
