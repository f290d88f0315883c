"""What both directions do to a tile in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared


@gluon.jit
def clear_padding(tile, valid):
    """Zeros the rows of a tile [rows, head_dim] in shared memory from `valid` on."""
    WIDTH: gl.constexpr = tile.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDTH, WIDTH], [4, 1], [1, 0])
    row = gl.arange(0, tile.shape[0], gl.SliceLayout(1, layout))
    block = tile.load(layout)
    tile.store(gl.where((row < valid)[:, None], block, gl.zeros_like(block)))
    fence_async_shared()
