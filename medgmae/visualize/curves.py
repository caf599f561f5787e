"""Curves of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medgmae.visualize.planes import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is drawn, where a run has it: the key in the log, the title, and whether the axis is logarithmic.
_CURVES = (
    ("loss", "loss", True),
    ("validation_loss", "validation loss", True),
    ("validation_psnr", "PSNR of hidden voxels, dB", False),
    ("validation_ssim", "SSIM", False),
    ("validation_auc", "AUC, held out", False),
    ("validation_dice", "Dice, held out", False),
    ("validation_r2", "R², held out", False),
    ("validation_concordance", "concordance, held out", False),
    ("global_reconstruction", "reconstruction of global views", True),
    ("local_reconstruction", "reconstruction of local views", True),
    ("global_consistency", "consistency of global views", False),
    ("local_consistency", "consistency of local views", False),
    ("teacher_entropy", "entropy of the teacher, nats", False),
    ("teacher_information", "information of the teacher, nats", False),
    ("agreement", "agreement of student and teacher", False),
    ("feature_variance", "variance of the teacher's features", False),
    ("effective_rank", "effective rank of the teacher's features", False),
    ("lr", "learning rate", False),
    ("grad_norm", "norm of the gradient", True),
    ("crops_per_second", "crops per second", False),
    ("data_wait", "share of time waiting for data", False),
)


def runs_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """The curves of one or several runs over their updates, one panel per number.

    Args:
        runs: by name, the lines of their logs: ``{"a": medgmae.training.read_metrics("a/metrics.jsonl")}``.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        ValueError: no run has a number yet.
    """
    curves = [curve for curve in _CURVES if any(curve[0] in line for lines in runs.values() for line in lines)]
    if not curves:
        raise ValueError(f"no numbers in the logs of {', '.join(runs) or 'no runs'}; expected some lines with a loss")
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure((3.6 * columns, 2.8 * rows))
    for number, (key, title, logarithmic) in enumerate(curves, 1):
        axes = figure.add_subplot(rows, columns, number)
        for which, (name, lines) in enumerate(runs.items()):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:  # the same colour in every panel
                axes.plot(
                    *zip(*points, strict=True),
                    label=name,
                    color=f"C{which % 10}",
                    marker="." if len(points) < 30 else "",
                )
        positive = all(line[key] > 0 for lines in runs.values() for line in lines if key in line)
        if logarithmic and positive:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.3)
        if number > columns * (rows - 1):
            axes.set_xlabel("updates", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    return figure
