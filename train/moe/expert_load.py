"""Writes how many tokens each expert got between two checkpoints, as numbers and as a picture.

    checkpoint-200/expert-load.json   counts by layer, expert and modality
    checkpoint-200/expert-load.png    the same as a heat map: rows layers, columns experts, a panel a modality

Axes: L sparse layers, E experts.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.storage.files import publish

Counts = npt.NDArray[np.int64]

# Constant, so that all pictures of a run have the same scale. An expert can get up to E / top_k times its even share;
# loads above this limit have the last colour.
_MAX_COLOUR_LOAD = 4.0

# In larger heat maps the cells have no number in them.
_MAX_ROWS_WITH_NUMBERS, _MAX_COLUMNS_WITH_NUMBERS = 32, 16
_MAX_TICKS = 24


@dataclass(frozen=True)
class ExpertLoad:
    """Numbers of tokens that each expert got, over all ranks, in steps `since_step` + 1 to `step`.

    layers             indices of the L sparse layers among all layers of the text model
    top_k              experts a token is sent to, so that every token counts `top_k` times in each layer
    text_LE, image_LE  int64, text and image tokens that each expert got
    """

    step: int
    since_step: int
    layers: tuple[int, ...]
    top_k: int
    text_LE: Counts
    image_LE: Counts

    @property
    def num_experts(self) -> int:
        """Returns E, the number of experts of a layer."""
        return int(self.text_LE.shape[1])

    def write(self, *directories: Path) -> None:
        """Writes expert-load.json and expert-load.png into each directory.

        Raises:
            StorageError: a file cannot be written.
        """
        numbers, picture = (json.dumps(self.to_dict()) + "\n").encode(), self.draw()
        for directory in directories:
            publish(directory / "expert-load.json", numbers)
            publish(directory / "expert-load.png", picture)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of expert-load.json; counts[modality][i][e] is for layer layers[i] and expert e."""
        counts = {"text": self.text_LE, "image": self.image_LE}
        return {
            "first_step": self.since_step + 1,
            "last_step": self.step,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            # Every layer counts each token top_k times.
            "tokens": {name: int(counts_LE[0].sum()) // self.top_k for name, counts_LE in counts.items()},
            "counts": {name: counts_LE.tolist() for name, counts_LE in counts.items()},
        }

    def draw(self) -> bytes:
        """Returns the picture as PNG."""
        # Without pyplot, because that keeps figures and chooses a backend for the whole process.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        tokens = self.to_dict()["tokens"]
        panels = {"image": self.image_LE} if tokens["image"] else {}
        if tokens["text"] or not panels:
            panels["text"] = self.text_LE
        width, height = min(9.0, max(2.6, 0.42 * self.num_experts)), min(12.0, max(1.1, 0.26 * len(self.layers)))
        figure = Figure(figsize=(1.6 + (width + 0.5) * len(panels), height + 1.5), dpi=130)
        FigureCanvasAgg(figure)
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08))
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        max_load = max(2.0, min(_MAX_COLOUR_LOAD, self.num_experts / self.top_k))
        for axis, (name, counts_LE) in zip(axes, panels.items(), strict=True):
            load_LE = self.num_experts * counts_LE / np.maximum(counts_LE.sum(1, keepdims=True), 1)
            image = _draw_heat_map(axis, load_LE, max_load)
            axis.set_title(f"{name} tokens ({tokens[name]:,})", fontsize=10)
            axis.set_xlabel("expert")
            _set_ticks(axis.xaxis, range(self.num_experts))
            _set_ticks(axis.yaxis, self.layers)
        axes[0].set_ylabel("layer")
        extend = "max" if self.num_experts / self.top_k > max_load else "neither"
        bar = figure.colorbar(image, ax=list(axes), extend=extend, extendfrac=0.03, pad=0.015)
        bar.set_label("share \u00d7 experts (1 = even)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        steps = f"steps {self.since_step + 1:,} to {self.step:,}"
        figure.suptitle(f"Expert load, {steps}: {self.num_experts} experts, top {self.top_k}", fontsize=11)
        png = io.BytesIO()
        figure.savefig(png, format="png")
        return png.getvalue()


def _draw_heat_map(axis: Any, load_LE: npt.NDArray[np.float64], max_load: float) -> Any:
    """Draws loads below 1 in blue and above in red, with each cell's number if there is room; returns the image."""
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(1.0, 0.0, max_load)
    image = axis.imshow(load_LE, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    num_rows, num_columns = load_LE.shape
    axis.set_xticks(np.arange(num_columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(num_rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2 if num_columns <= _MAX_COLUMNS_WITH_NUMBERS else 0.3)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_visible(False)
    if num_rows <= _MAX_ROWS_WITH_NUMBERS and num_columns <= _MAX_COLUMNS_WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(load_LE):
            # White on the dark colours of both ends of the scale.
            colour = "white" if abs(float(norm(value)) - 0.5) > 0.32 else "#222222"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=colour)
    return image


def _set_ticks(axis: Any, labels: Sequence[int]) -> None:
    """Labels the positions of an axis, or evenly spread ones if there are too many."""
    every = -(-len(labels) // _MAX_TICKS)
    axis.set_ticks(range(0, len(labels), every), labels=[str(label) for label in labels[::every]], fontsize=8)
