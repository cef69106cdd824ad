"""The jobs of gpu_first_hour.py: checks of every kernel, and timings. Each returns figures.

A check compares a kernel with implementation="reference" in float32 on the same device, whose
products run at the highest precision. An error is the norm of the difference, relative to the norm
of the reference's array.
"""

import dataclasses
import functools
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from benchmarks import inference, train_step
from benchmarks.cpu_kernels import by_ragged_dot
from benchmarks.kernels import gpu_shapes
from benchmarks.kernels.gpu_shapes import PASSES, SIZES, Shape
from finermoe_jax.config.flops import forward_flops
from finermoe_jax.config.hardware import peak_bandwidth, peak_flops
from finermoe_jax.config.model import ModelConfig, MoEConfig
from finermoe_jax.config.parse import preset, run_config
from finermoe_jax.config.presets import QWEN2P5
from finermoe_jax.config.run import RunConfig
from finermoe_jax.layers.causal import causal_attention
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.weights.upcycle import upcycled_config
from pallas_kernels.expert_ffn import expert_ffn
from pallas_kernels.expert_ffn.api import expert_ffn_of_run, unread
from pallas_kernels.grouped_matmul import grouped_matmul

Figures = dict[str, Any]
# Largest error of a result in this dtype.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
TINY = Shape(24, 16, 8, 4)
ROUNDS = 5


class Job(NamedTuple):
    """One job. Later jobs with the same kernel are omitted after a crash or a hang."""

    name: str
    kernel: str
    run: Callable[[], Figures]
    minutes: float  # at most


def jobs(smallest: bool) -> list[Job]:
    """Returns all jobs, the most important first; `smallest`: tiny shapes."""
    sizes = {"tiny": TINY} if smallest else SIZES
    first, *others = sizes
    rows = (2,) if smallest else (128, 16, 512, 2048, 32, 64, 256, 1024)
    found = list(checks(sizes, smallest))

    def timing(size: str, count: int) -> Job:
        run = functools.partial(time_expert_ffn, sizes[size], count)
        return Job(f"time expert_ffn, {size}, {count} rows per expert", "expert_ffn", run, 2.5)

    found += [timing(first, count) for count in rows[:4]]
    batches = (1,) if smallest else (1, 32)
    found.append(Job("time train step", "expert_ffn", lambda: time_step(smallest), 4))
    found += [
        Job(
            f"time prefill and decode, batch {batch}",
            "expert_ffn",
            functools.partial(time_generation, batch, smallest),
            4,
        )
        for batch in batches
    ]
    found += [timing(size, count) for size in others for count in rows[:4]]
    return found + [timing(size, count) for size in sizes for count in rows[4:]]


def device() -> Figures:
    """The device, its published peaks, and the versions of driver and libraries."""
    found = jax.devices()[0]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm",
             "--format=csv,noheader"]  # fmt: skip
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return {
        "platform": found.platform,
        "device": found.device_kind,
        "compute_capability": str(getattr(found, "compute_capability", "")),
        "peak_flops": peak_flops(found.device_kind),
        "bandwidth": peak_bandwidth(found.device_kind),
        "nvidia-smi": driver,
        "runtime": found.client.platform_version,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


# --- checks ---------------------------------------------------------------------------------


def checks(sizes: Mapping[str, Shape], smallest: bool) -> Iterator[Job]:
    """Yields the checks of every kernel."""

    def job(name: str, kernel: str, function: Callable[..., Figures], *arguments: Any) -> Job:
        return Job(f"check {name}", kernel, functools.partial(function, *arguments), 1.5)

    layouts = group_layouts(24 if smallest else 512)
    first = next(iter(sizes.values()))
    for size, shape in sizes.items():
        name = f"expert_ffn, {size}, bfloat16"
        yield job(name, "expert_ffn", check_expert_ffn, shape, "bfloat16", "bfloat16", layouts)
    if not smallest:
        yield job("expert_ffn, stack of layers", "expert_ffn", check_stack, first, layouts)
    for dtype in ("bfloat16",) if smallest else ("bfloat16", "float32"):
        for transpose in (False, True):
            name = f"grouped_matmul{', transposed' * transpose}, {dtype}"
            yield job(name, "grouped_matmul", check_grouped, first, dtype, transpose, layouts)
    for dtype, segments in (("bfloat16", False), ("bfloat16", True), ("float32", False)):
        name = f"attention, {dtype}{', segments' * segments}"
        yield job(name, "attention", check_attention, dtype, segments, smallest)
    yield job("expert_ffn, int8 weights", "int8", check_int8, first, layouts)
    if not smallest:
        for rows, weights in (("float32", "float32"), ("float16", "float16"),
                              ("bfloat16", "float32")):  # fmt: skip
            name = f"expert_ffn, rows {rows}, weights {weights}"
            yield job(name, "expert_ffn", check_expert_ffn, first, rows, weights, layouts)
        odd = Shape(72, 24, 40)
        name = "expert_ffn, widths that need padding"
        yield job(name, "expert_ffn", check_expert_ffn, odd, "bfloat16", "bfloat16", layouts)


def group_layouts(rows: int) -> dict[str, np.ndarray]:
    """Rows of each of eight experts, int32 [8], by name; all sum to `rows`."""
    odd = np.array([1, 0, 7, rows // 4 + 1, 0, rows // 3, 3, 0], np.int32)
    odd[-1] = rows - odd.sum()
    return {
        "even groups": np.full(8, rows // 8, np.int32),
        "odd and empty groups": odd,
        "all rows on one expert": np.array([0, 0, 0, rows, 0, 0, 0, 0], np.int32),
        "last expert empty": np.array([rows - 5, 0, 0, 0, 0, 0, 5, 0], np.int32),
    }


class Draw:
    """Draws normal values that `dtype` holds exactly."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, dtype: str, *shape: int, scale: float = 1.0) -> jax.Array:
        """Returns an array of this dtype and shape."""
        values = self.rng.standard_normal(shape, np.float32) * scale
        return jax.device_put(values.astype(jnp.dtype(dtype)))


def compared(
    got: Mapping[str, Any], wanted: Mapping[str, Any], dtype: str, where: str = ""
) -> Figures:
    """Errors of a kernel's arrays, and the names of those above the tolerance."""
    errors = {}
    for name, array in wanted.items():
        exact = np.asarray(array, np.float64)
        difference = np.linalg.norm((np.asarray(got[name], np.float64) - exact).ravel())
        norm = np.linalg.norm(exact.ravel())
        error = float(difference / norm if norm else difference)
        errors[f"{where}{name}"] = math.inf if math.isnan(error) else error
    wrong = [name for name, error in errors.items() if error > TOLERANCE[dtype]]
    return {"errors": errors, "wrong": wrong, "tolerance": TOLERANCE[dtype]}


def against_reference(
    run: Callable[..., Mapping[str, Any]],
    arguments: tuple[Any, ...],
    dtype: str,
    layouts: Mapping[str, np.ndarray],
    poison: tuple[int, ...] = (),
    first_expert: int = 0,
) -> Figures:
    """Compares run(None, sizes, *arguments) with run("reference", …) for every layout.

    The arguments numbered in `poison` are weights of first_expert and later experts. NaN is written
    to experts without rows: it must not reach the kernel's results.
    """
    kernel, reference = (jax.jit(functools.partial(run, how)) for how in (None, "reference"))
    wide = [a.astype(jnp.float32) for a in arguments]
    all_of: Figures = {"errors": {}, "wrong": []}
    for name, layout in layouts.items():
        sizes, own = jnp.asarray(layout), list(arguments)
        for index in poison:
            idle = first_expert + np.flatnonzero(layout == 0)
            own[index] = own[index].at[idle].set(jnp.nan)
        got = kernel(sizes, *own)
        with jax.default_matmul_precision("highest"):
            wanted = reference(sizes, *wide)
        one = compared(got, wanted, dtype, f"{name}: ")
        all_of["errors"] |= one["errors"]
        all_of["wrong"] += one["wrong"]
        all_of["tolerance"] = one["tolerance"]
    return all_of


def expert_arrays(draw: Draw, shape: Shape, rows: int, dtype: str, weights: str, *lead: int) -> Any:
    """Cotangent, rows, gate_up, down and row weights; `lead`: axes before the weights' own."""
    d, f, w, _ = shape
    return (
        draw(dtype, rows, w),
        draw(dtype, rows, d),
        draw(weights, *lead, 2 * f, d, scale=d**-0.5),
        draw(weights, *lead, f, w, scale=f**-0.5),
        jnp.abs(draw("float32", rows)) + 0.1,
    )


ARRAYS = ("rows", "gate_up", "down", "row_weights")


def check_expert_ffn(
    shape: Shape, dtype: str, weights: str, layouts: Mapping[str, np.ndarray]
) -> Figures:
    """Checks the output and the gradient in every array, of a window of eight of ten experts."""
    rows = int(next(iter(layouts.values())).sum())

    def run(how: Any, sizes: Any, dy: Any, *arrays: Any) -> dict[str, Any]:
        def forward(x: Any, gate_up: Any, down: Any, row_weights: Any) -> Any:
            return expert_ffn(x, gate_up, down, sizes, row_weights, how, first_expert=1)

        y, pull = jax.vjp(forward, *arrays)
        return {"y": y} | dict(zip(ARRAYS, pull(dy), strict=True))

    arrays = expert_arrays(Draw(), shape, rows, dtype, weights, 10)
    return against_reference(run, arrays, dtype, layouts, (2, 3), first_expert=1)


def check_stack(shape: Shape, layouts: Mapping[str, np.ndarray]) -> Figures:
    """Checks two layers whose weights are read in their stack, as training does."""
    rows = int(next(iter(layouts.values())).sum())
    square = Shape(shape.d, shape.f, shape.d)

    def run(how: Any, sizes: Any, dy: Any, *arrays: Any) -> dict[str, Any]:
        def forward(x: Any, gate_up: Any, down: Any, row_weights: Any) -> Any:
            stacked, own = (gate_up, down), lax.stop_gradient((gate_up, down))
            for layer in range(2):
                x, stacked = expert_ffn_of_run(
                    x, own[0], own[1], sizes, row_weights, layer, stacked, how
                )
            shapes = [(w.shape, w.dtype) for w in own]
            return unread(lambda: tuple(jnp.zeros(*each) for each in shapes), x, stacked)

        y, pull = jax.vjp(forward, *arrays)
        return {"y": y} | dict(zip(ARRAYS, pull(dy), strict=True))

    arrays = expert_arrays(Draw(), square, rows, "bfloat16", "bfloat16", 2, 8)
    return against_reference(run, arrays, "bfloat16", layouts)


def check_grouped(
    shape: Shape, dtype: str, transpose: bool, layouts: Mapping[str, np.ndarray]
) -> Figures:
    """Checks grouped_matmul and its gradients, those of the weights among them."""
    rows, (k, n) = int(next(iter(layouts.values())).sum()), (shape.d, 2 * shape.f)

    def run(how: Any, sizes: Any, dy: Any, *arrays: Any) -> dict[str, Any]:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, transpose, how), *arrays)
        return {"y": y} | dict(zip(("rows", "weights"), pull(dy), strict=True))

    draw, weights = Draw(), (n, k) if transpose else (k, n)
    arrays = draw(dtype, rows, n), draw(dtype, rows, k), draw(dtype, 8, *weights, scale=k**-0.5)
    return against_reference(run, arrays, dtype, layouts, poison=(2,))


def check_int8(shape: Shape, layouts: Mapping[str, np.ndarray]) -> Figures:
    """Checks the output with int8 weights against that with the same weights in float32."""
    d, f, w, _ = shape
    rows, draw, rng = int(next(iter(layouts.values())).sum()), Draw(), np.random.default_rng(1)
    gate_up, down = (
        jnp.asarray(rng.integers(-127, 128, (8, *each)), jnp.int8) for each in ((2 * f, d), (f, w))
    )
    scales = tuple(jnp.abs(draw("float32", 8, n)) / 127 / n**0.5 for n in (2 * f, w))
    x, weights = draw("bfloat16", rows, d), jnp.abs(draw("float32", rows))

    def run(how: Any, sizes: Any, x: Any, weights: Any) -> dict[str, Any]:
        if how is None:
            return {"y": expert_ffn(x, gate_up, down, sizes, weights, scales=scales)}
        wide = gate_up * scales[0][:, :, None], down * scales[1][:, None]
        return {"y": expert_ffn(x, *wide, sizes, weights, how)}

    return against_reference(run, (x, weights), "bfloat16", layouts)


def check_attention(dtype: str, segments: bool, smallest: bool) -> Figures:
    """Checks attention, as layers/causal.py selects it, and its gradients."""
    draw, found = Draw(), Figures(errors={}, wrong=[])
    tokens = 24 if smallest else 1000
    ids = jnp.repeat(jnp.arange(2), tokens // 2)[None] if segments else None

    def run(kernel: Any, dy: Any, *qkv: Any) -> dict[str, Any]:
        placement = Placement(kernel=kernel)
        y, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, ids, placement), *qkv)
        return {"y": y} | dict(zip("qkv", pull(dy), strict=True))

    kernel, reference = (jax.jit(functools.partial(run, how)) for how in (None, "reference"))
    for heads, kv_heads, width in [(4, 2, 8)] if smallest else [(14, 2, 64), (28, 4, 128)]:
        q, k, v, dy = (draw(dtype, 1, tokens, n, width) for n in (heads, kv_heads, kv_heads, heads))
        with jax.default_matmul_precision("highest"):
            wanted = reference(*(a.astype(jnp.float32) for a in (dy, q, k, v)))
            # Inside, too: by default XLA multiplies float32 in TensorFloat-32.
            got = kernel(dy, q, k, v)
        one = compared(got, wanted, dtype, f"{heads} heads of {width}: ")
        found = {"errors": found["errors"] | one["errors"], "wrong": found["wrong"] + one["wrong"],
                 "tolerance": one["tolerance"]}  # fmt: skip
    return found


# --- timings --------------------------------------------------------------------------------


def repeated(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """Jits `times` calls in a row, each of which waits for the one before.

    The dispatch from Python takes about as long as one call and would be part of its time.
    """

    def one(_: Any, carry: tuple[Any, Any], rest: tuple[Any, ...]) -> tuple[Any, Any]:
        x, previous = lax.optimization_barrier(carry)
        result = lax.optimization_barrier(function(x, *rest))
        first = [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(result)]
        return x, sum(first) + 0 * previous

    def run(x: Any, *rest: Any) -> Any:
        body = functools.partial(one, rest=rest)
        return lax.fori_loop(0, times, body, (x, jnp.float32(0)))[1]

    return jax.jit(run)


def limits(moved: float, flops: float) -> Figures:
    """Seconds that bytes and FLOPs need at the device's peaks; None if these are unknown."""
    kind = jax.devices()[0].device_kind
    bandwidth, peak = peak_bandwidth(kind), peak_flops(kind)
    return {
        "bytes": moved,
        "flops": flops,
        "bytes_bound_s": moved / bandwidth if bandwidth else None,
        "flops_bound_s": flops / peak if peak else None,
    }


def time_expert_ffn(shape: Shape, rows: int) -> Figures:
    """Times both passes of expert_ffn against XLA's ragged products, in turns."""
    sizes = jnp.full(shape.experts, rows, jnp.int32)
    draw_on_device = jax.jit(
        lambda key, like: jax.random.normal(key, like.shape, like.dtype) * like.shape[-1] ** -0.5
    )
    m, (d, f, w, experts) = shape.experts * rows, shape
    dy, x, gate_up, down, weights = (
        draw_on_device(jax.random.key(i), jnp.empty(each, dtype))
        for i, (each, dtype) in enumerate([
            ((m, w), jnp.bfloat16), ((m, d), jnp.bfloat16), ((experts, 2 * f, d), jnp.bfloat16),
            ((experts, f, w), jnp.bfloat16), ((m,), jnp.float32),
        ])
    )  # fmt: skip
    bounds, work = gpu_shapes.bound(shape, rows), gpu_shapes.flops(shape, rows)
    passes = {which: limits(bounds[which], work[which]) for which in PASSES}
    variants: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, function in (("expert_ffn", expert_ffn), ("lax.ragged_dot", by_ragged_dot)):
        for which in PASSES:
            seconds = max(passes[which][b] or 0 for b in ("bytes_bound_s", "flops_bound_s"))
            calls = max(1, min(32, round(2e-3 / seconds))) if seconds else 1
            passes[which]["calls"] = calls
            run = repeated(functools.partial(_passes[which], function), calls)
            try:
                jax.block_until_ready(run(x, dy, gate_up, down, sizes, weights))
            except Exception as error:  # out of memory, for one: the others are timed
                if function is expert_ffn:
                    raise
                failed[f"{name} {which}"] = str(error).strip().splitlines()[0][:200]
                continue
            variants[f"{name} {which}"] = functools.partial(
                run, x, dy, gate_up, down, sizes, weights
            )
    times = train_step.timed(variants, ROUNDS)
    samples = {
        name: [seconds / passes[name.split()[-1]]["calls"] for seconds in taken]
        for name, taken in times.items()
    }
    return {"rows": rows, "passes": passes, "samples": samples, "failed": failed}


def _forward(function: Any, x: Any, dy: Any, gate_up: Any, down: Any, sizes: Any, w: Any) -> Any:
    return function(x, gate_up, down, sizes, w)


def _backward(function: Any, x: Any, dy: Any, gate_up: Any, down: Any, sizes: Any, w: Any) -> Any:
    """All gradients, with what they recompute. Nothing reads the output, so it is not computed."""
    arrays = x, gate_up, down, w
    return jax.vjp(lambda x, a, b, w: function(x, a, b, sizes, w), *arrays)[1](dy)


_passes = {"forward": _forward, "backward": _backward}


def tiny_model() -> ModelConfig:
    """A FineRMoE model of one layer."""
    return dataclasses.replace(
        QWEN2P5["0.5B"], vocab_size=256, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=False, moe=MoEConfig(intermediate_granularity=4),
    )  # fmt: skip


def settings(smallest: bool) -> tuple[ModelConfig, RunConfig]:
    """The 0.5B model and its recipe, with 8 sequences a step."""
    config = run_config(preset("configs/qwen0p5b.py").to_dict())
    assert config.dense is not None and config.moe is not None
    model = tiny_model() if smallest else upcycled_config(config.dense, config.moe)
    batch = 2 if smallest else 8
    data = dataclasses.replace(
        config.data,
        global_batch_size=batch,
        sequence_length=16 if smallest else config.data.sequence_length,
    )
    train = dataclasses.replace(config.train, grad_accumulation=batch, steps=1000)
    model = dataclasses.replace(model, initializer_range=0.02)
    return model, dataclasses.replace(config, data=data, train=train)


def time_step(smallest: bool) -> Figures:
    """Times the whole training step with AdamW: one sequence at a time, 8 a step."""
    model, config = settings(smallest)
    stepper = train_step.Stepper(model, config)
    metrics = stepper.step()
    loss = float(metrics["loss"])
    # With random weights, the loss is close to log(vocabulary).
    if metrics["skipped"] or not abs(loss - math.log(model.vocab_size)) < 2:
        raise ValueError(f"loss {loss:g}, but log(vocabulary) is {math.log(model.vocab_size):g}")
    times = train_step.timed({"train step": stepper.step}, ROUNDS)
    tokens = config.data.global_batch_size * config.data.sequence_length
    return {
        "loss": loss,
        "parameters": stepper.parameters,
        "programs": {"train step": {"tokens": tokens} | limits(0, stepper.flops)},
        "samples": times,
    }


def time_generation(batch: int, smallest: bool) -> Figures:
    """Times prefill and decoding in bfloat16 with random weights."""
    model, _ = settings(smallest)
    prompt = 16 if smallest else 2048
    served = inference.Served(model, "bfloat16", batch, compute="bfloat16", prompt=prompt)
    if (np.asarray(served.decode()) < 0).any():
        raise ValueError("the model's logits are not finite")
    variants = {"prefill": lambda: served.prefill()[0], "decode": served.decode}
    times = train_step.timed(variants, ROUNDS)
    flops = sum(forward_flops(model, 2 * prompt).values()) * batch
    programs = {
        "prefill": {"tokens": batch * prompt} | limits(0, served.prefill_flops()),
        # A token after the prompt sees as many keys as the mean token of a text twice as long.
        "decode": {"tokens": batch} | limits(served.bytes()[1], flops),
    }
    return {"programs": programs, "samples": times}
