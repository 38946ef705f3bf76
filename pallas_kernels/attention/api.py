"""Public functions of attention over pages."""

from jaxtyping import Array, Float, Int

from pallas_kernels.attention import reference
from pallas_kernels.attention.gpu import kernels as mosaic_gpu
from pallas_kernels.attention.tpu import kernels as mosaic_tpu
from pallas_kernels.dispatch import by_sequence, dispatch


def retro_attention(
    q: Float[Array, "B W N D"],
    pages: Float[Array, "B K P 2 S D"],
    page_ids: Int[Array, "B K C"],
    counts: Int[Array, "B K"],
    last_loaded: Int[Array, "B K P"],
    positions: Int[Array, "B W"],
    cached_o: Float[Array, "B older N D"],
    cached_lse: Float[Array, "B older N"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "B W N D"], Float[Array, "B W N"], Int[Array, "B K P"]]:
    """One load of the selected pages serves the newest query and revises those before it.

    The newest slot (the last) attends to all selected pages. An older slot at position p attends to those
    it has not used yet, last_loaded < p; its result is merged with its cached one. Every slot sees only
    keys at positions <= its own. With W = 1 this is Quest's sparse attention. RetroAttention, section 3.

    Args:
      q: queries of the window's slots, oldest first, rotary embedding applied.
      pages: keys and values of one layer; pages that are not selected may hold anything.
      page_ids: the selected pages in any order, without repetition among the first `counts`.
      counts: how many entries of `page_ids` are selected; the rest may hold anything. 0 loads nothing.
      last_loaded: the position whose step loaded the page last, -1 if none did.
      positions: each slot's position, -1 for a slot without a query.
      cached_o: the older slots' attention outputs so far, float32.
      cached_lse: and their log-sum-exp, -inf for none.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      o: attention outputs, float32; 0 where nothing is visible.
      lse: their log-sum-exp, -inf where nothing is visible.
      last_loaded: with the selected pages set to the newest slot's position.

    Raises:
      ValueError: heads or slots do not fit together.
    """
    slots, heads = q.shape[1:3]
    if heads % pages.shape[1]:
        raise ValueError(f"{heads} query heads are not a multiple of {pages.shape[1]} KV heads")
    if cached_o.shape[1] != slots - 1:
        raise ValueError(
            f"the output cache holds {cached_o.shape[1]} slots; a window of {slots} needs {slots - 1}"
        )
    return dispatch(
        "retro_attention",
        implementation,
        {
            "xla": reference.retro_attention,
            "mosaic_gpu": mosaic_gpu.retro_attention,
            "mosaic_tpu": mosaic_tpu.retro_attention,
        },
        (by_sequence(2, 1, 1, 1, 1, None, 2, 2), by_sequence(2, 2, 1)),
        q,
        pages,
        page_ids,
        counts,
        last_loaded,
        positions,
        cached_o,
        cached_lse,
    )


def dense_attention(
    q: Float[Array, "B T N D"],
    pages: Float[Array, "B K P 2 S D"],
    positions: Int[Array, "B T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """Causal attention over every page up to each query's position, float32.

    Serves prefill (T tokens of a chunk), the dense prefix of layers and the full-attention baseline (T = 1).

    Args:
      q: queries, rotary embedding applied.
      pages: keys and values of one layer, those of the queries included; what lies beyond a query's
        position may hold anything.
      positions: each query's position; a query at -1 sees nothing and gives 0.
      implementation: see `pallas_kernels.dispatch`.

    Raises:
      ValueError: query heads are not a multiple of KV heads.
    """
    if q.shape[2] % pages.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {pages.shape[1]} KV heads")
    return dispatch(
        "dense_attention",
        implementation,
        {
            "xla": reference.dense_attention,
            "mosaic_gpu": mosaic_gpu.dense_attention,
            "mosaic_tpu": mosaic_tpu.dense_attention,
        },
        (by_sequence(2, 1, None), *by_sequence(2)),
        q,
        pages,
        positions,
    )
