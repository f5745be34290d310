"""The timeline of a pipeline as a picture: ranks by time, as the report's figure 5."""

from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_jax.parallel.simulate import Timeline

COLORS = {
    ("F", 0): "#f6c89f", ("F", 1): "#e39a5a",
    ("B", 0): "#a9d5a2", ("B", 1): "#63a95f",
    ("I", 0): "#a8c8ec", ("I", 1): "#5b93cf",
    ("W", 0): "#d7d7d7", ("W", 1): "#a8a8a8",
}  # fmt: skip
"""Of an operation, by kind and direction."""

_NAMES = {"F": "forward", "B": "backward", "I": "backward, input only", "W": "weight gradients"}
_LABELS_UP_TO = 900
"""Operations that still carry their microbatch's number: with more, it could not be read."""


def save_timeline(timeline: Timeline, out_png: Path, unit: str = "s", title: str | None = None) -> None:
    """Draws a timeline into a PNG file. `unit` names what its times are in.

    Raises:
        OSError: the file cannot be written.
    """
    ranks, operations = timeline.schedule.ranks, max(map(len, timeline.events))
    figure = Figure(figsize=(min(40, max(9, 0.16 * operations)), 1.6 + 0.3 * ranks), layout="constrained")
    draw_timeline(figure.subplots(), timeline, unit, title)
    figure.savefig(out_png, dpi=110)


def draw_timeline(ax: Axes, timeline: Timeline, unit: str = "s", title: str | None = None) -> None:
    """Draws a timeline: a row for each rank, an overlapped pair as two halves of a box, the forward above."""
    labelled = sum(map(len, timeline.events)) <= _LABELS_UP_TO
    for rank, events in enumerate(timeline.events):
        boxes: dict[tuple[str, float, float], list[tuple[float, float]]] = defaultdict(list)
        for event in events:
            height = 0.9 / len(event.op.parts)
            for i, part in enumerate(event.op.parts):
                bottom = rank - 0.45 + i * height
                boxes[COLORS[part.kind, part.direction], bottom, height].append((event.start, event.end - event.start))
                if labelled:
                    center = ((event.start + event.end) / 2, bottom + height / 2)
                    ax.text(*center, str(part.microbatch), ha="center", va="center", fontsize=6, clip_on=True)
        for (color, bottom, height), spans in boxes.items():
            ax.broken_barh(spans, (bottom, height), facecolor=color, edgecolor="white", linewidth=0.4)
    schedule = timeline.schedule
    ax.set(ylim=(schedule.ranks - 0.5, -0.5), xlim=(0, timeline.makespan), xlabel=f"time ({unit})", ylabel="rank")
    ax.set_yticks(range(schedule.ranks))
    ax.spines[["top", "right"]].set_visible(False)
    bubble = max(timeline.bubble) / timeline.makespan
    default = f"{schedule.kind}, {schedule.microbatches} microbatches: a rank waits at most {bubble:.1%} of the time"
    ax.set_title(title or default, loc="left")
    ax.legend(handles=_legend(timeline), loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")


def _legend(timeline: Timeline) -> list[Patch]:
    used = {(part.kind, part.direction) for events in timeline.events for event in events for part in event.op.parts}
    both = any(direction for _, direction in used)
    return [
        Patch(color=color, label=_NAMES[kind] + (f", direction {direction}" if both else ""))
        for (kind, direction), color in COLORS.items()
        if (kind, direction) in used
    ]
