"""ExpertBank: the experts of a run of layers, used one layer at a time.

A run's layers are stacked, [L, E, ...], and looped over. If the loop sliced a layer's experts out
of the stack, every pass would copy them before the kernel and their gradients after it. Instead the
kernel reads the experts of layer l in place, and its backward pass writes their gradients into the
run's stack (expert_ffn_of_run).

On a mesh a device's bank has its own E / P experts of each layer. If several devices store the same
experts (axes data and tensor), each accumulates the gradients of its own tokens in its own stack,
[R, L, E, ...] split over these axes; the stacks are summed once after the loop. Experts sharded
over fsdp are gathered layer by layer; the gathered layer is a bank of one layer.

If r neighbouring layers share a pool of experts (experts_across), the stack has one entry per pool,
[L / r, r * N, ...], and "layer" above means a pool. The pool's layers use its bank in turn. In the
backward pass the last of them writes the gradients, and the others add to them. Experts sharded
over fsdp are gathered by each of the r layers.

Experts in host memory (`HostBank`) are copied to the device when a layer has chosen them. The
copies are a bank of one layer (docs/host_experts.md).
"""

import dataclasses
import functools
import math
from typing import Any, NoReturn, Union

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from finermoe_jax.errors import InputError
from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.layers.stored import HostLayers, Quantized
from pallas_kernels.expert_ffn import empty_like, expert_ffn, expert_ffn_of_run, unread
from pallas_kernels.platform import Implementation, platform


@dataclasses.dataclass
class ExpertBank:
    """The experts of L layers and the layer in use.

    Attributes:
      gate_up: [L, E, 2F, D], the gate rows first; int8 with scales.
      down: [L, E, F, W].
      layer: int32, the layer in use.
      scales: float32 [L, E, 2F] and [L, E, W], of int8 weights.
      gradients: stacks that each use passes on to the next (expert_ffn_of_run); `ffn` replaces
        them. Empty: the experts get no gradient.
      adds: gradients are added to the stacks (`Summed`).
      ends: set on a bank of one layer, whose single use ends the loop with `CarriedBank.end`.
      window_of: of copies of some experts, the sizes (E, L * E) of their layer and its stack.
    """

    gate_up: Array
    down: Array
    layer: Int[Array, ""] | int = 0
    scales: tuple[Array, Array] | None = None
    gradients: tuple[Array, ...] = ()
    adds: bool = False
    ends: "CarriedBank | None" = None
    window_of: tuple[int, int] | None = None

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return self.gate_up.shape[1]

    def ffn(
        self,
        rows: Float[Array, "M D"],
        group_sizes: Int[Array, " E"],
        row_weights: Float[Array, " M"],
        kernel: Implementation | None,
    ) -> Float[Array, "M W"]:
        """Calls expert_ffn with the experts of `layer`."""
        if self.scales is not None:
            flat = [a.reshape(-1, *a.shape[2:]) for a in (self.gate_up, self.down, *self.scales)]
            first = jnp.asarray(self.layer * self.experts, jnp.int32)
            return expert_ffn(
                rows, flat[0], flat[1], group_sizes, row_weights, kernel, False, first,
                (flat[2], flat[3]), self.window_of,
            )  # fmt: skip
        with jax.named_scope("routed_experts"):
            y, self.gradients = expert_ffn_of_run(
                rows, self.gate_up, self.down, group_sizes, row_weights, self.layer,
                self.gradients, kernel, adds=self.adds, window_of=self.window_of,
            )  # fmt: skip
        return y

    def at(
        self, layer: Array | int, gradients: tuple[Array, ...], adds: bool = False
    ) -> "ExpertBank":
        """Returns the bank at another layer, with the gradients to pass on and to add to."""
        return dataclasses.replace(self, layer=layer, gradients=gradients, adds=self.adds or adds)

    def fetch(
        self, experts: Int[Array, "B T A"], x: Float[Array, "B T D"]
    ) -> tuple["ExpertBank", Int[Array, "B T A"], Float[Array, "B T D"]]:
        """Returns its arguments: the experts are on the device (cf. `HostBank.fetch`)."""
        return self, experts, x


@dataclasses.dataclass
class HostBank:
    """The experts of L layers in host memory, and the layer in use. They cannot be trained.

    The layer copies them to the device (`fetch`), or the host multiplies with them (`on_host`).

    Attributes:
      gate_up: [L, E, 2F, D].
      down: [L, E, F, W].
      layer: the layer in use.
      scales: [L, E, 2F] and [L, E, W], of int8 weights.
    """

    gate_up: HostLayers
    down: HostLayers
    layer: int = 0
    scales: tuple[HostLayers, HostLayers] | None = None
    gradients: tuple[()] = ()
    ends = None

    @property
    def experts(self) -> int:
        """Experts per layer."""
        return self.gate_up.shape[1]

    def at(
        self, layer: Array | int, gradients: tuple[Array, ...], adds: bool = False
    ) -> "HostBank":
        """Returns the bank at another layer."""
        assert isinstance(layer, int), "experts in host memory need layers written out"
        return dataclasses.replace(self, layer=layer)

    def fetch(
        self, experts: Int[Array, "B T A"], x: Float[Array, "B T D"]
    ) -> tuple[Union[ExpertBank, "HostBank"], Int[Array, "B T A"], Float[Array, "B T D"]]:
        """Copies the experts that a layer has chosen to the device.

        A decoding step copies one expert for each of S = B * A slots. If S is more than half of the
        layer, and for prompts, the whole layer is copied. An unused slot gets an expert a second
        time.

        Returns:
          The bank of the copies (or, for the host to compute with, this one), the experts' numbers
          in it, and x. What reads this x is scheduled after the choice of the experts, so that the
          transfers start first.
        """
        tokens, active = experts.shape[1:]
        slots, stacks = experts.size, self._stacks
        if tokens > 1 or slots > self.experts // 2:
            copies = [stack.whole(self.layer) for stack in stacks]
        elif self.gate_up.computed:
            return self, experts, x
        else:
            if slots == active:  # one token, whose experts differ
                chosen, experts = experts.reshape(-1), jnp.arange(active)[None, None]
            else:
                chosen, place = jnp.unique(experts.reshape(-1), return_inverse=True, size=slots)
                experts = place.reshape(experts.shape)
            if platform() == "cpu":
                chosen, experts = lax.optimization_barrier((chosen, experts))
            else:
                x, chosen = lax.optimization_barrier((x, chosen))
            copies = [stack.experts(self.layer, chosen) for stack in stacks]
        copies = _untrained(cpu.materialized(copies))
        gate_up, down, *rest = (copy[None] for copy in copies)
        scales: Any = tuple(rest) or None
        bank = ExpertBank(gate_up, down, scales=scales, window_of=self._window_of)
        return bank, experts.astype(jnp.int32), x

    def on_host(
        self,
        x: Float[Array, "B T D"],
        experts: Int[Array, "B T A"],
        weights: Float[Array, "B T A"],
    ) -> Float[Array, "B T A W"]:
        """`routed_experts` on the host: only rows and their results travel."""
        active = experts.shape[2]
        inputs = x.reshape(-1, x.shape[2]), experts.reshape(-1), weights.reshape(-1)
        moved = jax.device_put(inputs, jax.memory.Space.Host)
        stacks = _untrained([stack.layers[self.layer] for stack in self._stacks])
        y = compute_on(
            functools.partial(_rows_on_host, active),
            compute_type="device_host",
            out_memory_spaces=jax.memory.Space.Device,
        )(*moved, *stacks)
        return y.reshape(*experts.shape, -1)

    @property
    def _stacks(self) -> tuple[HostLayers, ...]:
        return (self.gate_up, self.down, *(self.scales or ()))

    @property
    def _window_of(self) -> tuple[int, int]:
        return self.experts, self.experts * len(self.gate_up.layers)


@jax.custom_jvp
def _untrained(weights: list[Array]) -> list[Array]:
    """Returns the weights. Raises InputError where they are differentiated."""
    return weights


@_untrained.defjvp
def _refuse(weights: Any, tangents: Any) -> NoReturn:
    raise InputError(
        "experts in host memory have no gradients: load the model with experts='device' to train "
        "it, or differentiate by its other parameters only"
    )


def _rows_on_host(
    active: int,
    x: Float[Array, "T D"],
    experts: Int[Array, " M"],
    weights: Float[Array, " M"],
    gate_up: Array,
    down: Array,
    *scales: Array,
) -> Float[Array, "M W"]:
    """Computes M = T * active weighted experts in float32, one after the other.

    Every operand is in host memory. A constant array would not be, so there is none.
    """

    def of(stack: Array, m: int) -> Array:
        start = (experts[m], *(experts[m] - experts[m] for _ in stack.shape[1:]))
        one = lax.dynamic_slice(stack, start, (1, *stack.shape[1:]), allow_negative_indices=False)
        return one[0].astype(jnp.float32)

    results = []
    for m in range(len(experts)):
        hidden = of(gate_up, m) @ x[m // active].astype(jnp.float32)
        hidden = hidden * of(scales[0], m) if scales else hidden
        gate, up = jnp.split(hidden, 2)
        y = (gate * lax.logistic(gate) * up) @ of(down, m)
        y = y * of(scales[1], m) if scales else y
        results.append(y * weights[m].astype(jnp.float32))
    return jnp.stack(results).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summed:
    """A bank's parameter in one of several microbatches, whose gradients are summed in float32.

    Attributes:
      weights: [L, E, ...], a constant.
      sums: float32 `Places.carried`, the sums of earlier microbatches.
      gradient: shaped like sums, values unused; its gradient is the sums plus this microbatch's.
    """

    weights: Any
    sums: Any
    gradient: Any

    def __getitem__(self, index: Any) -> "Summed":
        assert index is ...
        return self


def bank_of_run(
    gate_up: Any, down: Any, placement: Placement, frozen: bool = False
) -> "CarriedBank | None":
    """Returns the bank of a run's stacked arrays [L, E, ...] (or int8), to be read in place.

    None if the experts are sharded over fsdp. `frozen`: no gradient.
    """
    if isinstance(gate_up, Quantized) and isinstance(down, Quantized):
        scales = gate_up.scale, down.scale
        kind: Any = HostBank if isinstance(gate_up.values, HostLayers) else ExpertBank
        return CarriedBank(kind(gate_up.values, down.values, scales=scales), placement)
    if isinstance(gate_up, HostLayers):
        return CarriedBank(HostBank(gate_up, down), placement)
    if isinstance(gate_up, Summed) and isinstance(down, Summed):
        bank = ExpertBank(gate_up.weights, down.weights, adds=True)
        return CarriedBank(
            bank, placement, (gate_up.gradient, down.gradient), (gate_up.sums, down.sums)
        )
    places = Places.of(gate_up.shape[1], placement)
    if places.pieces:
        return None
    bank = ExpertBank(lax.stop_gradient(gate_up), lax.stop_gradient(down))
    return CarriedBank(bank, placement, () if frozen else places.carried((gate_up, down)))


def bank_of_layer(gate_up: Any, down: Any, placement: Placement) -> ExpertBank:
    """Returns the bank of a single layer's arrays [E, ...] (or int8)."""
    gate_up, down = jax.tree.map(lambda a: a[None], (gate_up, down))
    run = bank_of_run(gate_up, down, placement)
    if run is None:  # routed_experts gathers them and returns their gradients
        return ExpertBank(gate_up, down)
    bank = run.bank.at(0, run.carried)
    assert isinstance(bank, ExpertBank)
    return dataclasses.replace(bank, ends=run)


@dataclasses.dataclass(frozen=True)
class Places:
    """The sharding of a bank's experts.

    Attributes:
      experts: mesh axes that split the experts.
      copies: mesh axes whose devices hold the same experts and other tokens.
      mesh: None on one device.
    """

    experts: tuple[str, ...]
    copies: tuple[str, ...]
    mesh: Any

    @staticmethod
    def of(experts: int, placement: Placement) -> "Places":
        """Returns the sharding of `experts` experts on the placement's mesh."""
        mesh = placement.mesh
        if mesh is None or mesh.size == 1:
            return Places((), (), None)
        stored, _ = sharding.spec(("expert",), (experts,), mesh, "experts")
        split = tuple(a for a in sharding.mesh_axes(stored[0]) if mesh.shape[a] > 1)
        copies = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in split)
        return Places(split, copies, mesh)

    @property
    def pieces(self) -> bool:
        """True if experts are sharded over fsdp and gathered before use."""
        return "fsdp" in self.experts

    @property
    def stack(self) -> P:
        """PartitionSpec of the weights [L, E, ...]."""
        return P(None, self.experts or None)

    @property
    def gradient(self) -> P:
        """PartitionSpec of `carried`."""
        return P(self.copies, None, self.experts or None) if self.copies else self.stack

    def carried(self, stacks: tuple[Array, ...]) -> tuple[Array, ...]:
        """Returns the gradient stacks a loop carries: [L, E, ...], or [R, L, E, ...] for R copies.

        Their values are not read. The transpose of the broadcast sums the copies' gradients.
        """
        if not self.copies:
            return stacks
        count = math.prod(self.mesh.shape[axis] for axis in self.copies)
        place = NamedSharding(self.mesh, self.gradient)
        return tuple(
            lax.with_sharding_constraint(jnp.broadcast_to(w[None], (count, *w.shape)), place)
            for w in stacks
        )

    def zeros(self, stack: Array) -> Array:
        """Initial float32 sums of a stack's gradients."""
        return self.carried((jnp.zeros(stack.shape, jnp.float32),))[0]

    def total(self, sums: Array) -> Array:
        """Sums over all copies, [L, E, ...]."""
        return sums.sum(axis=0) if self.copies else sums


@dataclasses.dataclass(frozen=True)
class CarriedBank:
    """A run's bank and the stacks that a loop over its layers carries.

    Attributes:
      bank: the loop sets its layer.
      placement: the bank's mesh.
      carried: `Places.carried`, passed to the first use; empty: no gradients.
      sums: float32, shaped like carried, to which gradients are added; empty: they are written.
    """

    bank: ExpertBank | HostBank
    placement: Placement
    carried: tuple[Array, ...] = ()
    sums: tuple[Array, ...] = ()

    def end(self, x: Array, gradients: tuple[Array, ...]) -> Array:
        """Returns x, which depends on every use; `gradients` come from the last use."""
        if not gradients:
            return x
        if self.sums:
            return _from_sums(x, gradients, self.sums)
        places = Places.of(self.bank.experts, self.placement)
        if places.mesh is None:
            return unread(empty_like(gradients), x, gradients)
        place = NamedSharding(places.mesh, places.gradient)
        shapes = [(place.shard_shape(g.shape), g.dtype) for g in gradients]
        empty = jax.shard_map(
            lambda: tuple(lax.empty(*shape) for shape in shapes),
            mesh=places.mesh,
            in_specs=(),
            out_specs=tuple(places.gradient for _ in gradients),
            check_vma=False,
        )
        return unread(empty, x, gradients)


@jax.custom_vjp
def _from_sums(x: Array, gradients: tuple[Array, ...], sums: tuple[Array, ...]) -> Array:
    """Returns x; the backward pass starts from `sums` (cf. `unread`)."""
    return x


_from_sums.defvjp(
    lambda x, gradients, sums: (x, sums),
    lambda sums, dx: (dx, sums, tuple(jnp.zeros_like(s) for s in sums)),
)


def check_used(before: tuple[Array, ...], bank: ExpertBank | HostBank) -> None:
    """Raises InputError if a layer did not compute its experts through its bank.

    Their gradients would be uninitialised memory.
    """
    if before and bank.gradients is before:
        raise InputError(
            "a layer did not compute its experts with routed_experts of moe/exchange.py, so they "
            "get no gradient: call it with self.experts(placement) in your layer"
        )
