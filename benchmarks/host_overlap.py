"""Lists the work that is scheduled beside each transfer of experts from host memory.

    python benchmarks/host_overlap.py --sizes=0.5B,7B --chips=v5e,v6e [--each]

Compiles a decoding step at batch 1 for TPUs in four forms: each router reads its own layer's input
(on demand) or the layer's before (ahead), and the layers are written out, as generation has them,
or in a loop (rolled). In the compiler's schedule, work lies beside a transfer if it stands between
its start and its end. Nothing is measured. Needs the extra compile-tpu; takes minutes per form.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.experimental.layout import Format, Layout

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from finermoe_jax.analysis import programs
from finermoe_jax.analysis.aot import memory_of, out_of_memory
from finermoe_jax.analysis.hlo_costs import host_overlap
from finermoe_jax.analysis.topology import describe
from finermoe_jax.config.parse import run_config
from finermoe_jax.config.presets import qwen_config
from finermoe_jax.layers.stored import HostLayers
from finermoe_jax.model import stack
from finermoe_jax.moe.bank import HostBank

FORMS = [("on demand", 0, False), ("ahead", 1, False), ("on demand", 0, True), ("ahead", 1, True)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack(HostLayers):
    """HostLayers whose only array is the whole stack, for a loop over layers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return self.layers[0].shape

    def experts(self, layer: Any, chosen: Any) -> Any:
        """As HostLayers."""
        whole = self.layers[0]
        sizes, rest = (1, 1, *whole.shape[2:]), (0,) * (whole.ndim - 2)
        rows = (lax.dynamic_slice(whole, (layer, e, *rest), sizes)[0] for e in chosen)
        return jax.numpy.concatenate([jax.device_put(r, jax.memory.Space.Device) for r in rows])

    def whole(self, layer: Any) -> Any:
        """As HostLayers."""
        one = lax.dynamic_index_in_dim(self.layers[0], layer, keepdims=False)
        return jax.device_put(one, jax.memory.Space.Device)


def roll() -> None:
    """Makes this process compile a loop over the layers in place of written-out layers."""
    made = programs.host_shapes

    def whole(leaf: Any, stacked: bool) -> Any:
        if not isinstance(leaf, HostLayers):
            return leaf
        one = leaf.layers[0]
        place = one if isinstance(one, Format) else one.format
        rank = 1 + len(place.layout.major_to_minor)
        place = Format(Layout(tuple(range(rank))), place.sharding)
        if not stacked:
            return Stack((place,))
        shape = (len(leaf.layers), *one.shape)
        return Stack((jax.ShapeDtypeStruct(shape, one.dtype, sharding=place),))

    def shapes(*arguments: Any) -> tuple[dict, dict]:
        found, places = map(nnx.traversals.flatten_mapping, made(*arguments))
        found = {path: whole(leaf, True) for path, leaf in found.items()}
        places = {path: whole(leaf, False) for path, leaf in places.items()}
        return nnx.traversals.unflatten_mapping(found), nnx.traversals.unflatten_mapping(places)

    programs.host_shapes = shapes
    stack.HostBank = type("No bank", (), {})  # type: ignore[misc]
    HostBank.at = lambda bank, layer, *_: dataclasses.replace(bank, layer=layer)  # type: ignore


def main() -> None:
    """Compiles every form and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.5B,7B", help="sizes of Qwen2.5")
    parser.add_argument("--chips", default="v5e,v6e", help="TPU generations")
    parser.add_argument("--forms", default="0,1,2,3", help="rows of FORMS")
    parser.add_argument("--each", action="store_true", help="also a line for each transfer")
    given = parser.parse_args()
    print(
        f"{'size':<6}{'chip':<6}{'form':<24}{'GB moved':>9}{'transfers':>10}{'HBM GB':>8}"
        f"{'beside':>8}{'MB beside each':>16}{'MFLOP':>8}{'most MB':>9}{'peak GiB':>10}"
    )
    for form in sorted(map(int, given.forms.split(","))):  # rolled ones last
        name, ahead, rolled = FORMS[form]
        if rolled and programs.host_shapes.__module__ != __name__:
            roll()
        for size in given.sizes.split(","):
            for chip in given.chips.split(","):
                row(size, chip, name, ahead, rolled, given.each)


def row(size: str, chip: str, name: str, ahead: int, rolled: bool, each: bool) -> None:
    """Compiles one form and prints its row."""
    began = time.perf_counter()
    config = qwen_config(f"Qwen2.5-{size}", "")
    config.moe.route_ahead = ahead
    config.data.sequence_length = 1024
    target = describe(f"{chip}:1x1")
    program = programs.abstract_program(run_config(config.to_dict()), target, "decode", "host")
    title = f"{size:<6}{chip:<6}{name + (', rolled' if rolled else ', written out'):<24}"
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error)) / 2**30
        print(f"{title}does not fit: {needed:.2f} GiB of {target.chip.memory / 2**30:.2f}")
        return
    found = host_overlap(compiled.as_text())
    if each:
        for one in found.transfers:
            print(
                f"  {one.name:<28}{one.bytes / 1e6:9.2f} MB x {one.times:g}, beside "
                f"{one.hbm_bytes / 1e6:9.2f} MB of HBM, {one.flops / 1e6:9.2f} MFLOP"
            )
    beside = statistics.median(one.hbm_bytes for one in found.transfers)
    flops = statistics.median(one.flops for one in found.transfers)
    print(
        f"{title}{found.moved_bytes / 1e9:9.4f}{sum(t.times for t in found.transfers):10.0f}"
        f"{found.hbm_bytes / 1e9:8.2f}{found.covered_bytes / found.hbm_bytes:8.0%}"
        f"{beside / 1e6:16.1f}{flops / 1e6:8.0f}{found.most_in_flight / 1e6:9.1f}"
        f"{memory_of(compiled)['peak_bytes'] / 2**30:10.2f}   {time.perf_counter() - began:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
