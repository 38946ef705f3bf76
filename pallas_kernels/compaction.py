"""Writing the chosen pages one after another, in the language below Pallas, which has no operation for it.

Every thread looks at a page of its own. A warp's ballot tells each thread how many before it were chosen.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, scf
from jaxtyping import Array, Bool, Float, Int

_WARP = 32
_WARPS = 4


def chosen(score: Array, page: Array, high: Float[Array, ""], ties: Int[Array, ""]) -> Bool[Array, "..."]:
    """Whether pages belong to the set that a threshold describes."""
    return (score > high) | ((score == high) & (page < ties))


def write_pages(scores_smem: Any, warps_smem: Any, ids_ref: Any, *scalars: Any, interpret: Any) -> None:
    """Writes the pages of a range that were chosen, in their order.

    A page is chosen if its score is above `high`, or is `high` and the page lies before `ties`.

    Args:
      scores_smem: scores[tiles, 64] in shared memory.
      warps_smem: int32[4] of scratch.
      ids_ref: page_ids[C] in global memory.
      *scalars: start and end of the range, where in `ids_ref` to begin, the size of what may be written
        there, high (float32), ties.
      interpret: `InterpretGPUParams` where the kernel runs in the interpreter, which has no ballots.
    """
    if interpret is not None:
        _write_one_by_one(scores_smem, ids_ref, *scalars)
        return
    scalar = plgpu.Layout.WG_SPLAT(())
    plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), *[scalar] * len(scalars))
    )(_write)(scores_smem, warps_smem, ids_ref, *scalars)


def _write(_, scores_smem, warps_smem, ids_ref, *scalars):
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    start, end, offset, size, high, ties = (_value(scalar) for scalar in scalars)

    def constant(value):
        return arith.constant(i32, value)

    def at(value):
        return arith.index_cast(index, value)

    def less(a, b):
        return arith.cmpi(arith.CmpIPredicate.slt, a, b)

    thread = arith.remui(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)), constant(_WARP * _WARPS))
    warp, lane = arith.divui(thread, constant(_WARP)), arith.remui(thread, constant(_WARP))
    columns = ir.MemRefType(scores_smem.type).shape[1]

    # A warp's pages lie together, so that its offset follows from how many the warps before it write.
    groups = arith.ceildivsi(arith.subi(end, start), constant(_WARP * _WARPS))
    groups = arith.maxsi(groups, constant(0))
    first = arith.addi(start, arith.muli(warp, arith.muli(groups, constant(_WARP))))

    def look(group):
        """This thread's page of a group, whether it is chosen, and the warp's ballot of that."""
        page = arith.addi(arith.addi(first, arith.muli(group, constant(_WARP))), lane)
        inside = less(page, end)
        safe = arith.select(inside, page, start)
        place = [at(arith.divui(safe, constant(columns))), at(arith.remui(safe, constant(columns)))]
        score = memref.load(scores_smem, place)
        tie = arith.andi(arith.cmpf(arith.CmpFPredicate.OEQ, score, high), less(page, ties))
        above = arith.cmpf(arith.CmpFPredicate.OGT, score, high)
        chosen = arith.andi(inside, arith.ori(above, tie))
        flag = arith.extui(i32, chosen)
        ballot = mgpu.inline_ptx(
            "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            flag,
            result_types=i32,
            has_side_effects=True,
            convergent=True,
        )
        return page, chosen, ballot

    def ones(word):
        return mgpu.inline_ptx("popc.b32 $0, $1;", word, result_types=i32)

    def for_groups(carry, step):
        loop = scf.ForOp(constant(0), groups, constant(1), [carry])
        with ir.InsertionPoint(loop.body):
            scf.yield_([step(loop.induction_variable, loop.inner_iter_args[0])])
        return loop.results[0]

    own = for_groups(constant(0), lambda group, total: arith.addi(total, ones(look(group)[2])))
    memref.store(own, warps_smem, [at(warp)])
    mgpu.warpgroup_barrier()
    for other in range(_WARPS - 1):
        before = less(constant(other), warp)
        theirs = memref.load(warps_smem, [at(constant(other))])
        offset = arith.addi(offset, arith.select(before, theirs, constant(0)))

    below = arith.subi(arith.shli(constant(1), lane), constant(1))

    def write(group, offset):
        page, chosen, ballot = look(group)
        place = arith.addi(offset, ones(arith.andi(ballot, below)))
        with mgpu.when(arith.andi(chosen, less(place, size))):
            memref.store(page, ids_ref, [at(place)])
        return arith.addi(offset, ones(ballot))

    for_groups(offset, write)


def _value(scalar):
    return scalar if isinstance(scalar, ir.Value) else scalar.registers.item()


def _write_one_by_one(scores_smem, ids_ref, start, end, offset, size, high, ties):
    columns = jnp.int32(scores_smem.shape[1])

    def write(page, offset):
        score = scores_smem[lax.div(page, columns), lax.rem(page, columns)]
        take = chosen(score, page, high, ties) & (offset < size)

        @pl.when(take)
        def _():
            ids_ref[offset] = page

        return offset + take.astype(jnp.int32)

    lax.fori_loop(start, end, write, offset)
