"""Timelines as pictures."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

from dsv3_jax.parallel.schedule import make
from dsv3_jax.parallel.simulate import ChunkTimes, simulate
from dsv3_jax.planner.pictures import COLORS, draw_timeline, save_timeline


def test_every_operation_is_drawn_in_its_color(tmp_path):
    timeline = simulate(make("dualpipe", 4, 8), ChunkTimes())
    save_timeline(timeline, tmp_path / "out.png")
    pixels = {
        tuple(pixel) for pixel in np.round(imread(tmp_path / "out.png")[..., :3] * 255).astype(int).reshape(-1, 3)
    }
    for color in COLORS.values():
        assert tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) in pixels


def test_axes_are_ranks_by_time_and_the_legend_names_what_there_is():
    ax = Figure().subplots()
    draw_timeline(ax, simulate(make("1f1b", 4, 8), ChunkTimes()), unit="F")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (F)", "rank")
    assert ax.get_xlim() == (0, 33)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["forward", "backward"]
    assert "1f1b, 8 microbatches: a rank waits at most 27.3%" in ax.get_title(loc="left")
    numbers = sorted(int(text.get_text()) for text in ax.texts)
    assert numbers == sorted([*range(8)] * 8)
