"""Sending a row to all devices and waiting for theirs, in the language below Pallas, which has no such wait.

Addresses among GPUs of one process are valid on all of them, so a device is told where others want it.
The data is its own flag, as in NCCL's low-latency protocols: a cell holds `EMPTY` until it is written, a word
of it is written at once, and no word that is sent is `EMPTY`. What is read is made empty again.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, vector

EMPTY = -0.0
"""Of each of the two numbers in a word: it is sent as zero, which adds the same."""
_EMPTY_WORD = -0x7FFF8000  # 0x80008000
_THREADS = 128
_PIECE = 16
"""Bytes that a thread writes or reads at once."""
_AT_ONCE = 16
"""Pieces that a thread waits for at once, so that it has registers for them."""


def numbers_at_once(dtype: Any) -> int:
    """Neighbouring numbers of a row in one thread; a row is a multiple of 128 times as many."""
    return _PIECE // jnp.dtype(dtype).itemsize


def layout(columns: int, dtype: Any) -> Any:
    """How a row lies over the threads of a warpgroup."""
    return plgpu.Layout.WG_STRIDED((columns,), vec_size=numbers_at_once(dtype))


def write_address(array: Any, to: Any) -> None:
    """Writes where an array in global memory begins to an int32[2], lower half first."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def write(_, array, to):
        llvm.store(_start(array), mgpu.memref_ptr(to))

    write(array, to)


def sum_rows(row: Any, incoming: Any, addresses: Any, place: Any) -> Any:
    """Sends a row, waits for those of all devices, and adds them up in their order.

    Args:
      row: (M,), in `layout`.
      incoming: the cells of this device for that row, (devices, M); empty afterwards.
      addresses: of all devices' cells, as by `write_address`, (devices, 2).
      place: where the row goes on all devices, in rows from there.

    Returns:
      The sum, float32.
    """
    (columns,), dtype, devices = row.shape, row.dtype, addresses.shape[0]
    over_threads, piece = layout(columns, dtype), numbers_at_once(dtype)
    pieces = columns // (_THREADS * piece)

    @plgpu.inline_mgpu(
        arg_types=(over_threads, plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=over_threads),
    )
    def exchange(_, row, incoming, addresses, place):
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        words = ir.VectorType.get((4,), i32)
        thread = arith.remui(gpu.thread_id(gpu.Dimension.x), mgpu.c(_THREADS, ir.IndexType.get()))
        offset = arith.muli(arith.index_cast(i64, thread), mgpu.c(_PIECE, i64))
        empty = mgpu.c(_EMPTY_WORD, i32)

        def piece_of(start, number):
            return arith.addi(arith.addi(start, offset), mgpu.c(number * _THREADS * _PIECE, i64))

        def store(address, *four):
            ptx = "st.relaxed.sys.global.v4.b32 [$0], {$1, $2, $3, $4};"
            mgpu.inline_ptx(ptx, address, *four, has_side_effects=True)

        rows = arith.extui(i64, place.registers.item())
        into = arith.muli(rows, mgpu.c(pieces * _THREADS * _PIECE, i64))
        table = mgpu.memref_ptr(addresses)
        outgoing = [
            arith.addi(llvm.load(i64, mgpu.getelementptr(table, [device], i64)), into)
            for device in range(devices)
        ]
        for number, register in enumerate(row.registers.flat):
            register = vector.bitcast(words, register)
            sent = []
            for index in range(4):
                word = vector.extract(register, [], [index])
                taken = arith.cmpi(arith.CmpIPredicate.eq, word, empty)
                sent.append(arith.select(taken, mgpu.c(0, i32), word))
            for start in outgoing:
                store(piece_of(start, number), *sent)

        half = ir.VectorType.get((piece,), mgpu.dtype_to_ir_type(dtype))
        single = ir.VectorType.get((piece,), ir.F32Type.get())
        here = [piece_of(_start(incoming), number) for number in range(devices * pieces)]
        total = np.empty(pieces, object)
        for first in range(0, len(here), _AT_ONCE):
            some = here[first : first + _AT_ONCE]
            found = _wait(some, i32)
            for number, address in enumerate(some, start=first):
                store(address, *[empty] * 4)
                part, found = vector.from_elements(words, found[:4]), found[4:]
                part = arith.extf(single, vector.bitcast(half, part))
                at = number % pieces
                total[at] = part if number < pieces else arith.addf(total[at], part)
        strided = fragmented_array.WGStridedFragLayout((columns,), piece)
        return fragmented_array.FragmentedArray(_registers=total, _layout=strided, _is_signed=None)

    return exchange(row, incoming, addresses, place)


def _start(array):
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), mgpu.memref_ptr(array))


def _wait(addresses, i32):
    """The words at some addresses, once none of them is empty."""
    words = [f"${index}" for index in range(4 * len(addresses))]
    loads = [
        f"ld.relaxed.sys.global.v4.b32 {{{', '.join(words[4 * at : 4 * at + 4])}}}, [${len(words) + at}];"
        for at in range(len(addresses))
    ]
    looks = [f"setp.eq.or.s32 missing, {word}, {_EMPTY_WORD}, missing;" for word in words]
    program = [".reg .pred missing;", "again:", *loads, "setp.ne.s32 missing, 0, 0;", *looks]
    ptx = " ".join(["{", *program, "@missing bra again;", "}"])
    return mgpu.inline_ptx(ptx, *addresses, result_types=[i32] * len(words), has_side_effects=True)
