"""Pictures of a run, drawn from its metrics.jsonl."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy import ndarray

from dsv3_jax.train.report import read_metrics

type Rows = list[dict[str, Any]]

UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
RELATIVE_LOAD = "load / mean load of the layer"


def draw_curves(
    metrics_path: Path, out_png: Path, bigram_loss: float | None = None, validation_loss: float | None = None
) -> None:
    """Draws what a run reported over the tokens it has seen: loss, MTP loss and accuracy, gradient norm, learning
    rate, and speed. What the rows lack is left out.

    `bigram_loss` and `validation_loss`, in nats per token, join the loss as a line and as a point at the end. Raises
    ValueError when the file has no rows.
    """
    rows = _rows(metrics_path)
    tokens, unit = _token_axis(rows)

    def loss(ax: Axes) -> None:
        _line(ax, tokens, _column(rows, "loss"), label="training")
        if bigram_loss is not None:
            ax.axhline(bigram_loss, color="0.4", linestyle="--", label=f"bigram counts, {bigram_loss:.3f}")
        if validation_loss is not None:
            label = f"held-out text, {validation_loss:.3f}"
            ax.plot(tokens[-1], validation_loss, "D", color="tab:red", label=label, zorder=3)
        _describe(ax, "Next-token loss", "nats per token", legend=True)

    def mtp_loss(ax: Axes) -> None:
        _lines(ax, tokens, _column(rows, "mtp_loss"), lambda k: f"{k + 1} tokens ahead")
        _describe(ax, "Multi-token prediction: loss", "nats per token", legend=True)

    def mtp_accuracy(ax: Axes) -> None:
        _lines(ax, tokens, _column(rows, "mtp_accuracy"), lambda k: f"{k + 1} tokens ahead")
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        _describe(ax, "Multi-token prediction: accuracy", "tokens predicted right", legend=True)

    def grad_norm(ax: Axes) -> None:
        _line(ax, tokens, _column(rows, "grad_norm"))
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        _describe(ax, "Gradient norm, before clipping", "global L2 norm")

    def lr(ax: Axes) -> None:
        _line(ax, tokens, _column(rows, "lr"))
        ax.yaxis.set_major_formatter("{x:.1e}")
        ax.set_ylim(bottom=0)
        _describe(ax, "Learning rate", "AdamW learning rate")

    def speed(ax: Axes) -> None:
        values = _column([row["timing"] for row in rows], "tokens_per_second")
        _line(ax, tokens, values)
        middle = np.nanmedian(values)
        ax.axhline(middle, color="0.4", linestyle="--", label=f"median {middle:,.0f}")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set_ylim(bottom=0)
        _describe(ax, "Speed", "tokens per second", legend=True)

    last = rows[-1]
    panels = [("loss", loss), ("mtp_loss", mtp_loss), ("mtp_accuracy", mtp_accuracy)]
    panels += [("grad_norm", grad_norm), ("lr", lr)]
    drawn = [draw for key, draw in panels if not _absent(last.get(key))]
    if all("tokens_per_second" in row.get("timing", {}) for row in rows):
        drawn.append(speed)
    _save(drawn, f"tokens seen{unit}", out_png)


def draw_expert_load(metrics_path: Path, out_png: Path) -> None:
    """Draws how evenly the routed experts are used: the busiest expert's load over the mean, for each MoE layer over
    the steps; and every expert's load over its layer's mean in the last row, where that has an `expert_load` matrix
    (layers x experts).

    Raises ValueError when the file has no rows, or these no `expert_load_max_over_mean`, as without MoE layers.
    """
    rows = _rows(metrics_path)
    if _absent(rows[-1].get("expert_load_max_over_mean")):
        raise ValueError(f"{metrics_path}: its rows have no expert_load_max_over_mean: the model has no MoE layers")
    steps, last = _column(rows, "step"), rows[-1]
    matrix = last.get("expert_load")
    figure = Figure(figsize=(9, 4.5 if _absent(matrix) else 9), layout="constrained")
    axes = figure.subplots(1 if _absent(matrix) else 2, squeeze=False)[:, 0]
    _draw_imbalance(axes[0], steps, _column(rows, "expert_load_max_over_mean"))
    if not _absent(matrix):
        _draw_load(axes[1], np.array(matrix, float), last["step"])
    figure.savefig(out_png, dpi=120)


def _draw_imbalance(ax: Axes, steps: Float[ndarray, " rows"], load: Float[ndarray, "rows layers"]) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    if load.shape[1] > 8:  # as lines they would hide each other
        extent = (steps[0] - 0.5, steps[-1] + 0.5, load.shape[1] + 0.5, 0.5)
        _heatmap(ax, load.T, extent, cmap="viridis", vmin=1)
        ax.set_title("Busiest expert of each MoE layer", loc="left")
        return
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, load.shape[1]))
    for layer, color in enumerate(colors, 1):
        _line(ax, steps, load[:, layer - 1], color=color, label=f"layer {layer}")
    ax.axhline(1, color="0.4", linestyle="--", label="even load")
    _describe(ax, "Busiest expert of each MoE layer", RELATIVE_LOAD, legend=True)


def _draw_load(ax: Axes, load: Float[ndarray, "layers experts"], step: int) -> None:
    layers, experts = load.shape
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-30)
    # white is the even load, whatever the extremes
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, relative.max()))
    _heatmap(ax, relative, (0.5, experts + 0.5, layers + 0.5, 0.5), cmap="RdBu_r", norm=norm)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("routed expert")
    ax.set_title(f"Load of every expert at step {step}", loc="left")


def _heatmap(ax: Axes, values: Float[ndarray, "layers columns"], extent: tuple[float, ...], **colors: Any) -> None:
    image = ax.imshow(values, aspect="auto", interpolation="nearest", extent=extent, **colors)
    ax.figure.colorbar(image, ax=ax, label=RELATIVE_LOAD)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_ylabel("MoE layer")


def _rows(path: Path) -> Rows:
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path} has no rows to draw: the run has not finished a step")
    return rows


def _absent(value: Any) -> bool:
    return value is None or value == []


def _column(rows: Rows, key: str) -> Float[ndarray, "rows ..."]:
    """A metric of all rows; null becomes NaN, which leaves a gap in the line."""
    return np.array([row[key] for row in rows], float)


def _token_axis(rows: Rows) -> tuple[Float[ndarray, " rows"], str]:
    tokens = _column(rows, "tokens")
    size, name = next(((size, name) for size, name in UNITS if tokens[-1] >= size), (1, ""))
    return tokens / size, f" ({name})" if name else ""


def _line(ax: Axes, x: Float[ndarray, " rows"], y: Float[ndarray, " rows"], **style: Any) -> None:
    ax.plot(x, y, linewidth=1.2, marker="o" if len(x) <= 30 else None, markersize=3, **style)


def _lines(ax: Axes, x: Float[ndarray, " rows"], y: Float[ndarray, "rows lines"], label: Callable[[int], str]) -> None:
    for i, values in enumerate(y.T, 1):
        _line(ax, x, values, label=label(i))


def _describe(ax: Axes, title: str, y: str, legend: bool = False) -> None:
    ax.set_title(title, loc="left")
    ax.set_ylabel(y)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize="small")


def _save(panels: list[Callable[[Axes], None]], x_label: str, out_png: Path) -> None:
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).flat
    for ax, draw in zip(axes, panels, strict=False):
        draw(ax)
        ax.set_xlabel(x_label)
    for ax in list(axes)[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(out_png, dpi=120)
