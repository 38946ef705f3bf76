"""What every picture must hold, small or large: points, words inside the canvas, lines told apart, and n."""

import itertools
import re

import numpy as np
from matplotlib.lines import Line2D

PATH = (
    "/home/someone/.cache/huggingface/hub/models--org--Model_$with$_signs/snapshots/0e9e39f249a16976918f6564"
)
"""A model's name as long as they come."""


def check(figure):
    renderer = figure.canvas.get_renderer()
    (legend,) = figure.legends
    words = [figure.get_suptitle(), figure.get_supxlabel(), *(text.get_text() for text in legend.get_texts())]
    assert re.search(r"\bn = \d", figure.get_supxlabel()), "n is not told"
    assert all(words) and not any(". ." in text for text in words)
    boxes = {f"axes {number}": axes.get_tightbbox(renderer) for number, axes in enumerate(figure.axes)}
    boxes["legend"] = legend.get_window_extent(renderer)
    boxes["title"] = figure._suptitle.get_window_extent(renderer)
    boxes["note"] = figure._supxlabel.get_window_extent(renderer)
    for name, box in boxes.items():
        inside = (
            box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        )
        assert inside, f"{name} runs off the edge: {box} of {figure.bbox}"
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        overlap = first.intersection(first.padded(-2), second.padded(-2))
        assert overlap is None or not overlap.width or not overlap.height, f"{one} covers {other}"
    assert figure.axes
    for axes in figure.axes:
        check_panel(axes)
    handles = [
        (handle.get_color(), handle.get_linestyle(), handle.get_marker(), handle.get_markerfacecolor())
        if isinstance(handle, Line2D)
        else handle.get_facecolor()
        for handle in legend.legend_handles
    ]
    assert len(set(handles)) == len(handles), "lines cannot be told apart"
    width, height = figure.get_size_inches()
    assert width < 21 and height < 13


def check_panel(axes):
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    points = [np.asarray(line.get_xydata(), float) for line in lines]
    bars = [patch for patch in axes.patches if patch.get_height()]
    assert bars or sum(np.isfinite(xy).all(axis=1).sum() for xy in points), "a panel has no point"
    for line, xy in zip(lines, points, strict=True):
        if line.get_marker():
            reach = line.get_markersize() / 2 * axes.figure.dpi / 72
            places = axes.transData.transform(xy)
            assert (places >= axes.bbox.min + reach).all() and (places <= axes.bbox.max - reach).all(), "cut"
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        assert ticks and (axis.get_label().get_text() or axes.patches or axes.get_shared_y_axes())
        labels = [axis.get_major_formatter()(tick) for tick in ticks]
        assert len(set(labels)) == len(labels), f"ticks say the same: {labels}"
