"""Histograms for the trackers that have them; verl's own interface takes scalars only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdar_verl.report.distributions import GAP_EDGES, GATE_EDGES

HISTOGRAMS = {"sdar/gap_histogram": "gap_histogram", "sdar/gate_histogram": "gate_histogram"}
"""Name in the tracker -> key of the distributions."""


def log_histograms(trainer: Any, step: int, distributions: Mapping[str, Any]) -> None:
    """Send the step's gap and gate histograms to W&B and TensorBoard where the run uses them.

    Args:
        trainer: verl's trainer; its ``logger`` holds one backend per tracker.
        step: verl's global step.
        distributions: of :func:`sdar_verl.report.distributions.token_distributions`; without tokens nothing is sent.
    """
    backends = getattr(getattr(trainer, "logger", None), "logger", {})
    if "gap_histogram" not in distributions or not {"wandb", "tensorboard"} & set(backends):
        return
    # The outer bins of the gap are open; their tokens are shown at the last finite edge.
    width, inner = GAP_EDGES[2] - GAP_EDGES[1], GAP_EDGES[1:-1]
    gap_edges = np.concatenate([[inner[0] - width], inner, [inner[-1] + width]])
    edges = {"gap_histogram": gap_edges, "gate_histogram": GATE_EDGES}
    histograms = {name: (np.asarray(distributions[key]), edges[key]) for name, key in HISTOGRAMS.items()}
    if "wandb" in backends:
        import wandb

        # verl logs the step's scalars later, under the same number: commit=False leaves the step open for them.
        values = {name: wandb.Histogram(np_histogram=histogram) for name, histogram in histograms.items()}
        backends["wandb"].log(values, step=step, commit=False)
    if "tensorboard" in backends:
        for name, (counts, bounds) in histograms.items():
            _tensorboard(backends["tensorboard"].writer, name, counts, bounds, step)


def _tensorboard(writer: Any, name: str, counts: np.ndarray, edges: np.ndarray, step: int) -> None:
    centres = (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        name,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=int(counts.sum()),
        sum=float((counts * centres).sum()),
        sum_squares=float((counts * centres**2).sum()),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
