"""Counting of bundles, and what the attention kernel costs on each chip at the page size that suits it."""

import dataclasses
import json
from pathlib import Path

import pytest

from pallas_kernels.tpu import CHIPS
from retro_jax.experiments.tpu import compiler as tpu_compiler
from retro_jax.experiments.tpu import schedule as tpu_schedule
from retro_jax.experiments.tpu.schedule import Schedule, measure, parse, predict

SCHEDULE = """
= control target key start
LH: loop header
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %9 = sbr.rel (%p1) target = $region9 }
   0x3   : > {}
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7 LB: >> { %v1 = vmatmul.mubr.bf16 %v2 }
   0x8   : >> { %s3 = sld [smem:[#allocation3]]  ;;  %1 = sst [smem:[#allocation7_spill]] %s3 }
   0x9   : >> { %8 = sbr.rel (%p2) target = $region8 }
   0xa   : >> {}
   0xb   : >> {}
   0xc   : >> {}
   0xd   : >> {}
   0xe   : >> { %4 = dma.done.wait %s4, 48 }
   0xf LB: >>> { %v5 = vst [vmem:[%s5]] %v1 }
  0x10   : >>> { %7 = sbr.rel (!%p3) target = $region7 }
  0x11 PF: >> { %s6 = sadd.s32 1, %s3 } /* Start/End empty region 8 :: Start region 5 */
  0x12   : >> { %6 = sbr.rel (!%p4) target = $region6 }
  0x13 PF: > { %s7 = sadd.s32 1, %s2 } /* Start/End empty region 9 */
  0x14   :  { %5 = sbr.rel (!%p5) target = $region5 }
"""


def test_bundles_of_a_block_and_of_an_item():
    """Of the ten bundles of the loop over blocks one is issued once an item, beside seven around the loop."""
    assert measure(parse(SCHEDULE), pages=4) == Schedule(block=9, item=8, pages=4, spills=1)


def test_loops_over_scales_are_counted_apart():
    """One transposes those that came, the next one has others copied; one before had the first copied."""
    text = ["> {}", ">> { dma.hbm_to_vmem }", ">> {}", ">> {}", ">> {}", ">> { vxpose }", ">> {}", ">> {}"]
    text += [">> { dma.hbm_to_vmem }", ">> {}", ">> { vmatmul }", "> {}"]
    labels = ["LB", "LB", "  ", "  ", "  ", "LB", "  ", "  ", "LB", "  ", "LB", "  "]
    lines = [f"0x{i:x} {label}: {rest}" for i, (label, rest) in enumerate(zip(labels, text, strict=True))]
    bundles = parse("\n".join(lines))
    assert measure(bundles, pages=4) == Schedule(block=1, item=2, pages=4, spills=0, scales=3 + 2)
    assert (
        measure([dataclasses.replace(b, text=b.text.replace("vxpose", "")) for b in bundles], 4).scales == 0
    )


def test_scales_of_the_whole_context_are_issued_and_read():
    schedule = Schedule(block=100, item=50, pages=4, spills=0, scales=30)
    sizes = {"pages": 9, "page_bytes": 8, "items": 2}
    without = predict("v5e", schedule, **sizes)
    scaled = predict("v5e", schedule, **sizes, context_pages=130, scale_bytes=5)
    assert scaled.issue == pytest.approx(without.issue + 2 * 2 * 30 / 1.5e9)
    assert scaled.memory == pytest.approx(without.memory + 2 * 2 * 128 * 5 / 819e9)


def test_the_longer_of_issuing_and_reading_binds():
    schedule = Schedule(block=100, item=50, pages=4, spills=0)
    few = predict("v5e", schedule, pages=9, page_bytes=8, items=2)
    assert few.issue == pytest.approx(2 * (3 * 100 + 50) / 1.5e9)
    assert few.memory == pytest.approx(2 * 9 * 8 / 819e9)
    assert few.time == few.issue + few.start
    many = predict("v5e", schedule, pages=9, page_bytes=1 << 20, items=2)
    assert many.time == many.memory + many.start


@pytest.mark.skipif(not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test")
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("chip", "page_size"), [("v5e", 16), ("v6e", 32), ("tpu7x", 64)])
def test_attention_is_bound_by_memory(chip, page_size):
    """Llama-3.1-8B, 15% of 128k tokens: within 1.25 of the time to read, and a window of 4 costs nothing."""
    pages = -(-131072 * 15 // 100 // page_size)
    times = []
    for window in (1, 4):
        schedule = tpu_schedule.attention(chip, page_size, window)
        prediction = predict(chip, schedule, pages, page_size * 512, items=8)
        assert prediction.time < 1.25 * prediction.memory
        times.append(prediction.time)
    assert times[1] < 1.03 * times[0]


@pytest.mark.skipif(not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("chip", CHIPS)
def test_costs_are_those_that_were_committed(chip):
    """A change that moves them writes them anew: python -m retro_jax.experiments.tpu.schedule costs."""
    committed = json.loads(Path(__file__).with_name("tpu_costs.json").read_text())
    assert tpu_schedule.costs(chip) == committed["bfloat16"][chip]


@pytest.mark.skipif(not tpu_compiler.installed(), reason="needs the package of tpu-compiler.txt: make test")
@pytest.mark.timeout(240)
def test_costs_of_pages_in_8_bits_are_those_that_were_committed():
    """Of one chip, whose compiler is the others' too: the rest are committed with them."""
    committed = json.loads(Path(__file__).with_name("tpu_costs.json").read_text())
    assert committed["int8"].keys() == CHIPS.keys()
    assert tpu_schedule.costs_in_8_bits("v6e") == committed["int8"]["v6e"]


def test_a_compiler_that_fails_is_reported():
    with pytest.raises(RuntimeError, match=r"no schedule of retro_attention by .*page_size.*"):
        tpu_schedule.dump(
            "retro_jax.experiments.tpu.schedule:compile_attention",
            "retro_attention",
            chip="v5e",
            page_size=8,
            window=1,
            context=1024,
        )
