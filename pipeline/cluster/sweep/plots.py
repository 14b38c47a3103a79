"""Pictures of a sweep: parallel coordinates, importance of the parameters, learning curves, Pareto front."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import whole
from pipeline.cluster.sweep.trials import Trial

Names = Mapping[str, str]
Axis = tuple[np.ndarray, list[tuple[float, str]]]
"""Positions in [0, 1], nan where a trial has no such parameter, and the labels along the axis."""


def draw(
    output: Path, trials: Sequence[Trial], front: Sequence[Trial], names: Names, objectives: Sequence[str]
) -> list[str]:
    """Draw every picture that the trials give material for into `output`; return the file names."""
    ranked = [trial for trial in trials if trial.ranked]
    pictures: dict[str, Callable[[Any], None]] = {
        "search_coordinates.png": lambda axes: _coordinates(axes, ranked, names),
        "search_curves.png": lambda axes: _curves(axes, ranked, front),
        "search_tradeoff.png": lambda axes: _tradeoff(axes, ranked, front, objectives),
    }
    if shares := importance(ranked, list(names)):
        pictures["search_importance.png"] = lambda axes: _importance(axes, shares, names)
    for name, paint in pictures.items():
        _save(output / name, paint, wide="coordinates" in name)
    return list(pictures)


def importance(trials: Sequence[Trial], keys: Sequence[str]) -> dict[str, float]:
    """Share of each parameter in explaining robust accuracy, summing to 1; empty with too few trials to say.

    Mean decrease in impurity of a random forest over the trials (Breiman, 2001).
    """
    keys = [key for key in keys if len({str(trial.values.get(key)) for trial in trials}) > 1]
    if len(trials) < 8 or not keys:
        return {}
    from sklearn.ensemble import RandomForestRegressor

    features = np.nan_to_num(np.stack([_axis(trials, key)[0] for key in keys], axis=1), nan=-1.0)
    forest = RandomForestRegressor(n_estimators=200, random_state=0, min_samples_leaf=2)
    forest.fit(features, [trial.score(["robust"])[0] for trial in trials])
    shares = {key: float(share) for key, share in zip(keys, forest.feature_importances_, strict=True)}
    return dict(sorted(shares.items(), key=lambda item: item[1], reverse=True)) if sum(shares.values()) > 0 else {}


def _save(path: Path, paint: Callable[[Any], None], *, wide: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if wide else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure.subplots())
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _coordinates(axes: Any, trials: Sequence[Trial], names: Names) -> None:
    """One vertical axis per parameter, one line per trial, coloured by its robust accuracy."""
    import matplotlib as mpl

    columns = {names[key]: _axis(trials, key) for key in names}
    robust = np.array([100 * trial.score(["robust"])[0] for trial in trials])
    low, high = robust.min(), max(robust.max(), robust.min() + 1e-9)
    columns["robust %"] = (robust - low) / (high - low), [(0.0, f"{low:.1f}"), (1.0, f"{high:.1f}")]
    colours = mpl.colormaps["viridis_r"]
    for row in np.argsort(robust):
        heights = [positions[row] for positions, _ in columns.values()]
        colour = colours((robust[row] - low) / (high - low))
        axes.plot(range(len(columns)), heights, color=colour, alpha=0.85, linewidth=1.4, marker=".", markersize=5)
    for x, (_, marks) in enumerate(columns.values()):
        axes.axvline(x, color="0.6", linewidth=0.8, zorder=0)
        for height, label in marks:
            axes.annotate(label, (x, height), xytext=(4, 2), textcoords="offset points", fontsize=7, color="0.25")
    labels = [name.replace("_", " ") for name in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=20, ha="right", fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 0.4)
    axes.set_title("Trials by their parameters; darker is more robust", fontsize=10)
    axes.spines[:].set_visible(False)


def _curves(axes: Any, trials: Sequence[Trial], front: Sequence[Trial]) -> None:
    """Robust accuracy of every trial over its epochs."""
    best = front[0].number
    for trial in sorted(trials, key=lambda trial: trial.number == best):
        style = {"color": "C3", "linewidth": 2.0} if trial.number == best else {"color": "0.65", "linewidth": 1.0}
        label = f"trial {trial.number + 1}, the best" if trial.number == best else None
        epochs = [point.epoch for point in trial.history]
        axes.plot(epochs, [100 * point.robust for point in trial.history], marker=".", label=label, **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation robust accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    _open_frame(axes)


def _tradeoff(axes: Any, trials: Sequence[Trial], front: Sequence[Trial], objectives: Sequence[str]) -> None:
    """Clean against robust accuracy; with two objectives, the Pareto front."""
    points = 100 * np.array([trial.score(["clean", "robust"]) for trial in trials])
    axes.scatter(points[:, 0], points[:, 1], color="0.55", s=24, label="trials")
    edge = 100 * np.array(sorted(trial.score(["clean", "robust"]) for trial in front))
    label = "Pareto front" if len(objectives) > 1 else f"best {objectives[0]}"
    axes.plot(edge[:, 0], edge[:, 1], color="C3", marker="o", markersize=6, label=label)
    axes.set_xlabel("validation clean accuracy, %")
    axes.set_ylabel("validation robust accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    _open_frame(axes)


def _importance(axes: Any, shares: Mapping[str, float], names: Names) -> None:
    """Bars of the shares, the largest on top."""
    labels = [names[key].replace("_", " ") for key in shares][::-1]
    axes.barh(labels, list(shares.values())[::-1], color="C0")
    axes.set_xlabel("share in explaining robust accuracy")
    axes.tick_params(labelsize=8)
    _open_frame(axes)


def _open_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _axis(trials: Sequence[Trial], key: str) -> Axis:
    """Numbers from the smallest to the largest, by their logarithm where they span a factor of 20; others by name."""
    values = [trial.values.get(key) for trial in trials]
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        return _numbers(np.array([np.nan if value is None else float(value) for value in values]))
    options = sorted({str(value) for value in present})
    scale = max(len(options) - 1, 1)
    positions = [np.nan if value is None else options.index(str(value)) / scale for value in values]
    return np.array(positions), [(index / scale, option) for index, option in enumerate(options)]


def _numbers(values: np.ndarray) -> Axis:
    low, high = np.nanmin(values), np.nanmax(values)
    if low == high:
        return np.where(np.isnan(values), np.nan, 0.5), [(0.5, f"{low:.3g}")]
    scaled, ends = (np.log(values), np.log([low, high])) if low > 0 and high / low > 20 else (values, [low, high])
    return (scaled - ends[0]) / (ends[1] - ends[0]), [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
