"""Shapes of the published sizes' experts, and the FLOPs and bytes of the GPU kernels of expert_ffn.

Letters: E experts, M rows, D model width, F intermediate, W output width; F' is F rounded up to a
multiple of 64. Bytes are counted for balanced groups of a multiple of eight rows and elements of
two bytes.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """Widths of an expert, and the number of experts."""

    d: int
    f: int
    w: int
    experts: int = 128

    @property
    def gate_up(self) -> int:
        """Elements of all experts' gate and up matrices."""
        return self.experts * 2 * self.f * self.d

    @property
    def down(self) -> int:
        """Elements of all experts' down matrices."""
        return self.experts * self.f * self.w


SIZES = {"0.5B": Shape(896, 152, 448), "1.5B": Shape(1536, 280, 768), "7B": Shape(3584, 592, 1792)}
PASSES = ("forward", "backward")


def flops(shape: Shape, rows: int) -> dict[str, float]:
    """FLOPs of each pass for `rows` rows per expert.

    The backward pass includes gate, up and the gradient of the activated intermediate: nothing is
    stored for it.
    """
    m, inner, outer = shape.experts * rows, shape.d * shape.f, shape.f * shape.w
    return {"forward": m * (4.0 * inner + 2 * outer), "backward": m * (12.0 * inner + 4 * outer)}


def bound(shape: Shape, rows: int) -> dict[str, int]:
    """Least HBM bytes of each pass: rows, cotangent and weights read once, results written once."""
    m, weights = shape.experts * rows, shape.gate_up + shape.down
    forward = m * shape.d + weights + m * shape.w
    return {"forward": 2 * forward, "backward": 2 * (forward + m * shape.d + weights)}


def excess(shape: Shape, rows: int) -> dict[str, int]:
    """HBM bytes of the backward pass above its bound, by cause, if L2 serves a kernel's rereads."""
    from pallas_kernels.expert_ffn import mosaic_gpu as ffn

    m = shape.experts * rows
    padded = m * -(-shape.f // ffn.BLOCK) * ffn.BLOCK
    fused = ffn.keeps_hidden(shape.f)
    causes = {
        "rows and cotangent, read again for the weights' gradients": m * (shape.d + shape.w),
        "intermediates, written": 3 * padded,
        "intermediates, read": (3 if fused else 5) * padded,
        "gate and up, read again for the rows' gradient": 0 if fused else shape.gate_up,
    }
    return {cause: 2 * count for cause, count in causes.items()}


def copies(shape: Shape, rows: int) -> dict[str, int]:
    """Bytes of all TMA copies to shared memory and of the results, by pass."""
    from pallas_kernels import hopper
    from pallas_kernels.expert_ffn import mosaic_gpu as ffn

    d, f, w, experts = shape
    f_blocks = -(-f // ffn.BLOCK)
    f_padded = f_blocks * ffn.BLOCK
    tile, wide = ffn.tile_rows(f), ffn.W_BLOCKS * ffn.BLOCK
    each = -(-f_blocks // 2) * tile * d + 2 * f_padded * d + f_padded * -(-w // wide) * wide
    forward = experts * -(-rows // tile) * each + experts * rows * w

    each = f_blocks * ((hopper.TILE_ROWS + 2 * ffn.BLOCK) * d + (hopper.TILE_ROWS + ffn.BLOCK) * w)
    rows_gradient = 0
    if ffn.keeps_hidden(f):
        each += 2 * f_padded * -(-d // wide) * wide
    else:
        rows_gradient = _product(shape, rows, 2 * f_padded, d)
    backward = experts * -(-rows // hopper.TILE_ROWS) * each + rows_gradient
    backward += _gradient(shape, rows, 2 * f_padded, d) + _gradient(shape, rows, f_padded, w)
    backward += experts * rows * (3 * f_padded + d) + shape.gate_up + shape.down
    return {"forward": 2 * forward, "backward": 2 * backward}


def _product(shape: Shape, rows: int, k: int, n: int) -> int:
    """Elements that grouped_matmul copies."""
    from pallas_kernels import hopper
    from pallas_kernels.grouped_matmul import mosaic_gpu as matmul

    columns = matmul.tile_columns(n)
    tiles = shape.experts * -(-rows // hopper.TILE_ROWS) * -(-n // columns)
    return tiles * k * (hopper.TILE_ROWS + columns)


def _gradient(shape: Shape, rows: int, k: int, n: int) -> int:
    """Elements that weight_gradient copies."""
    from pallas_kernels import hopper
    from pallas_kernels.grouped_matmul import mosaic_gpu as matmul

    columns = matmul.tile_columns(n)
    tiles = shape.experts * -(-k // hopper.TILE_ROWS) * -(-n // columns)
    return tiles * -(-rows // hopper.STEP) * hopper.STEP * (hopper.TILE_ROWS + columns)
