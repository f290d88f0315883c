"""What differs between the versions of Gluon that the kernels compile with, 3.6 to 3.9, and nothing else.

TMA functions go by their newest names:

    3.8, 3.9           3.6, 3.7
    async_load         async_copy_global_to_shared
    async_store        async_copy_shared_to_global
    async_atomic_add   the operation without a function

3.9 copies what a matrix product reads from registers right before it. An operand that is read in every pass
of a loop would take its registers twice, and spill others; there it stays in shared memory.
"""

import triton
from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

_VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])

HOLDS_OPERANDS = gl.constexpr(_VERSION < (3, 9))

if _VERSION >= (3, 8):
    async_load = tma.async_load
    async_store = tma.async_store
    async_atomic_add = tma.async_atomic_add
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global

    @builtin
    def async_atomic_add(descriptor, coordinates, source, _semantic=None):
        """Adds shared memory to global memory."""
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        _semantic.builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
        )
