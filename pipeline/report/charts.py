"""The charts: overview, robust accuracy against eps, training curves, sweep, responses of the activations."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.config.base import ThreatModel, told_in_levels
from pipeline.report.facts import Row
from pipeline.report.gates import Response
from pipeline.report.inputs import ModelCard, ReportInputs
from pipeline.report.theme import CONTROL, GRID, INK, MUTED, OURS, THIRD, drawing, svg

_SURROUNDING_STYLE = {-2.0: (CONTROL, "-"), 0.0: (INK, "-"), 2.0: (OURS, "-")}


class Chart(NamedTuple):
    """A chart in the page."""

    name: str
    """Of its PNG file."""
    title: str
    note: str
    svg: str


def draw(
    name: str,
    title: str,
    paint: Callable[[Axes], None],
    output: Path,
    *,
    dpi: int,
    note: str = "",
    size: tuple[float, float] = (4.4, 3.1),
) -> Chart:
    """Paint one pair of axes; write it as `output`/<name>.png and return it as SVG."""
    with drawing():
        figure = Figure(figsize=size)
        axes = figure.subplots()
        axes.set_title(", ".join(filter(None, (title, note))))
        paint(axes)
        figure.savefig(output / f"{name}.png", dpi=dpi, facecolor="white")
        axes.set_title("")
        return Chart(name, title, note, svg(figure, name))


def overview(summary: Sequence[Row], output: Path, *, dpi: int) -> Chart:
    """Clean and robust accuracy of every model, with intervals."""

    def paint(axes: Axes) -> None:
        for index, row in enumerate(reversed(summary)):
            colour = _colour(row.card)
            axes.plot([row.robust.value, row.clean.value], [index, index], color=GRID, linewidth=5, zorder=1)
            for accuracy, fill in ((row.clean, "none"), (row.robust, colour)):
                error = [[accuracy.value - accuracy.low], [accuracy.high - accuracy.value]]
                axes.errorbar(accuracy.value, index, xerr=error, color=colour, linewidth=1.5, capsize=0, zorder=2)
                axes.plot(accuracy.value, index, "o", color=colour, markerfacecolor=fill, markersize=8, zorder=3)
        axes.set_yticks(
            range(len(summary)), [_short(f"{r.card.label} · {r.card.activation}", 34) for r in reversed(summary)]
        )
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(-0.6, len(summary) - 0.4)
        axes.set_xlim(0, 1)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(percent)
        axes.set_xlabel("accuracy: filled = under attack, hollow = clean")

    return draw("overview", "Clean and robust accuracy", paint, output, dpi=dpi, size=(5.6, 1.0 + 0.36 * len(summary)))


def robustness_curves(inputs: ReportInputs, output: Path, *, dpi: int) -> list[Chart]:
    """Robust accuracy against eps, one chart per target."""

    def paint(cards: Sequence[ModelCard], axes: Axes) -> None:
        threat = cards[0].evaluation.config.threat
        scale = 255.0 if in_pixel_steps(threat) else 1.0
        for card in cards:
            points = card.evaluation.curve
            eps = [scale * point.eps for point in points]
            axes.fill_between(
                eps,
                [p.accuracy.low for p in points],
                [p.accuracy.high for p in points],
                color=_colour(card),
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(
                eps,
                [p.accuracy.value for p in points],
                color=_colour(card),
                marker="o",
                markersize=4,
                label=_name(card),
            )
        axes.axhline(1 / len(cards[0].class_names), color=MUTED, linewidth=1, linestyle=(0, (2, 3)), label="chance")
        axes.axvline(scale * threat.eps, color=MUTED, linewidth=1)
        _accuracy_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"eps ({threat.norm}" + (", in 1/255)" if scale > 1 else ")"))
        axes.legend()

    return _per_target(inputs, "eps", paint, output, dpi=dpi, shown=lambda card: bool(card.evaluation.curve))


def training_curves(inputs: ReportInputs, output: Path, *, dpi: int) -> list[Chart]:
    """Validation accuracy by epoch, one chart per target; the selected epoch is marked."""

    def paint(cards: Sequence[ModelCard], axes: Axes) -> None:
        for card in cards:
            epochs = [epoch.epoch for epoch in card.trained.history]
            robust = [epoch.val_robust for epoch in card.trained.history]
            axes.plot(
                epochs,
                [e.val_clean for e in card.trained.history],
                color=_colour(card),
                linestyle=(0, (4, 2)),
                linewidth=1.3,
            )
            axes.plot(epochs, robust, color=_colour(card), label=_name(card))
            if card.trained.selected_epoch in epochs:
                chosen = epochs.index(card.trained.selected_epoch)
                axes.plot(epochs[chosen], robust[chosen], "o", color=_colour(card), markersize=7)
        _accuracy_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.legend()

    return _per_target(
        inputs, "training", paint, output, dpi=dpi, shown=lambda card: bool(card.trained.history), note=_validated
    )


def sweep(inputs: ReportInputs, output: Path, *, dpi: int) -> Chart:
    """Clean against robust accuracy of the trials; the Pareto front is joined."""

    def paint(axes: Axes) -> None:
        front = sorted(pareto_front([(t.clean, t.robust) for t in inputs.trials]))
        axes.plot(
            [c for c, _ in front], [r for _, r in front], color=THIRD, linewidth=1.5, zorder=1, label="Pareto front"
        )
        for best in (False, True):
            chosen = [trial for trial in inputs.trials if trial.best is best]
            style = (
                {"color": OURS, "s": 70.0, "label": "taken"} if best else {"color": MUTED, "s": 30.0, "label": "trial"}
            )
            if chosen:
                axes.scatter([t.clean for t in chosen], [t.robust for t in chosen], zorder=3 if best else 2, **style)  # type: ignore[arg-type]
        axes.xaxis.set_major_formatter(percent)
        axes.yaxis.set_major_formatter(percent)
        axes.set_xlabel("clean accuracy (validation)")
        axes.set_ylabel("robust accuracy (validation)")
        axes.legend()

    return draw("sweep", "Search: clean against robust", paint, output, dpi=dpi, note=_validated(inputs.models[0]))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates."""
    return [p for p in set(points) if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]


def response_curves(found: Sequence[Response], output: Path, *, dpi: int) -> list[Chart]:
    """Output at one position against the input there, for three values of the neighbours; one chart per stage."""

    def paint(response: Response, axes: Axes) -> None:
        axes.plot(response.x, response.x.clip(min=0), color=MUTED, linewidth=1, linestyle=(0, (2, 3)), label="ReLU")
        for around, y in response.y.items():
            colour, style = _SURROUNDING_STYLE[around]
            axes.plot(
                response.x,
                y,
                color=colour,
                linestyle=style,
                label=f"neighbours {around:+.0f}".replace("+0", "0"),
            )
        axes.set_xlabel("input x at the position")
        axes.set_ylabel("output y there")
        axes.legend()

    return [
        draw(
            f"response-stage{r.stage}",
            f"Stage {r.stage}",
            partial(paint, r),
            output,
            dpi=dpi,
            note=f"channel {r.channel} of {r.num_channels}",
        )
        for r in found
    ]


def _per_target(
    inputs: ReportInputs,
    name: str,
    paint: Callable[[list[ModelCard], Axes], None],
    output: Path,
    *,
    dpi: int,
    shown: Callable[[ModelCard], bool],
    note: Callable[[ModelCard], str] = lambda _: "",
) -> list[Chart]:
    charts = []
    for number, (target, cards) in enumerate(_targets(inputs)):
        drawn = [card for card in cards if shown(card)]
        if drawn:
            notes = (f"{drawn[0].architecture} on {drawn[0].dataset}", note(drawn[0]))
            text = ", ".join(filter(None, notes))
            charts.append(draw(f"{name}-{number}", target, partial(paint, drawn), output, dpi=dpi, note=text))
    return charts


def in_pixel_steps(threat: ThreatModel) -> bool:
    """Whether eps is told in grey levels of 8-bit images, as in 8/255."""
    return threat.norm == "linf" and told_in_levels(threat.eps)


def _targets(inputs: ReportInputs) -> Iterator[tuple[str, list[ModelCard]]]:
    for target in dict.fromkeys(card.target for card in inputs.models):
        yield target, [card for card in inputs.models if card.target == target]


def _validated(card: ModelCard) -> str:
    return "" if card.num_validation is None else f"n = {card.num_validation} validation images"


def percent(value: float, _: float | None = None) -> str:
    """A tick of an axis of accuracies in [0, 1], with the decimals that it has: two ticks never read the same."""
    return f"{100 * value:.4g}%"


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(percent)


def _colour(card: ModelCard) -> str:
    return CONTROL if card.role == "control" else OURS


def _name(card: ModelCard) -> str:
    frozen = {"transfer": " (frozen)", "source": "", "control": " (control)"}[card.role]
    return _short(card.activation + frozen, 28)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
