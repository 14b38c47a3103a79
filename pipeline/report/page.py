"""The report: one HTML page that needs nothing else; beside it the charts as PNG, the numbers as CSV and JSON."""

import base64
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment

from pipeline.config.base import radius_label
from pipeline.config.report import ReportConfig
from pipeline.evaluation.stats import Accuracy
from pipeline.report import charts, facts
from pipeline.report.environment import environment
from pipeline.report.gates import responses
from pipeline.report.inputs import ModelCard, ReportInputs
from pipeline.report.pictures import Gallery, gallery, write_sheet
from pipeline.report.tables import write_tables
from pipeline.training import load_model

PAGE = "report.html"
_OURS = re.compile(
    r"(overview|sweep|search_\w+|(eps|training|pictures)-\d+|response-stage\d+)\.png|"
    r"(summary|transfer|two_by_two|per_class|curves|training|audit|sweep)\.csv"
)
_ICONS = {"pass": "✓", "warn": "!", "fail": "✕", "skip": "–"}

ModelLoader = Callable[[Path], torch.nn.Module]


class Report(NamedTuple):
    """What was written."""

    page: Path
    files: tuple[Path, ...]
    """All files, the page among them."""


def build_report(
    inputs: ReportInputs, output: Path, config: ReportConfig | None = None, *, load: ModelLoader = load_model
) -> Report:
    """Write the report into `output`, replacing an earlier one.

    Args:
        inputs: the records it is made of.
        output: directory of report.html, the PNG, CSV and JSON files.
        config: what it shows.
        load: reads a model directory, in eval mode on the CPU.

    Raises:
        ValueError: when the arrays of an evaluation are missing or altered.
    """
    config = config or ReportConfig()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".report-") as scratch:
        _write(inputs, Path(scratch), config, load)
        made = sorted(path.name for path in Path(scratch).iterdir())
        for name in sorted(made, key=lambda name: name == PAGE):  # the page last: it shows that all is there
            (Path(scratch) / name).replace(output / name)
    for path in output.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in made:
            path.unlink()
    return Report(output / PAGE, tuple(output / name for name in made))


def _write(inputs: ReportInputs, output: Path, config: ReportConfig, load: ModelLoader) -> None:
    summary = facts.rows(inputs)
    models = _load_models(inputs, load, needed=config.num_pictures > 0)
    galleries = _galleries(inputs, models, output, config)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            inputs=inputs,
            rows=summary,
            headline=[row for row in summary if row.gain is not None],
            cells=facts.two_by_two(summary),
            class_tables=facts.per_class(inputs),
            checks=facts.check_names(inputs),
            overview=charts.overview(summary, output, dpi=config.png_dpi),
            eps_charts=charts.robustness_curves(inputs, output, dpi=config.png_dpi),
            training_charts=charts.training_curves(inputs, output, dpi=config.png_dpi),
            sweep=charts.sweep(inputs, output, dpi=config.png_dpi) if inputs.trials else None,
            sweep_pictures=_sweep_pictures(inputs, output),
            response_charts=_responses(inputs, galleries, models, output, config),
            galleries=galleries,
            source=inputs.models[0],
        )
    )
    (output / PAGE).write_text(page, encoding="utf-8")
    write_tables(inputs, summary, output)


def _load_models(inputs: ReportInputs, load: ModelLoader, *, needed: bool) -> dict[str, torch.nn.Module]:
    cards = [card for card in inputs.models if card.model_directory is not None and needed]
    return {card.label: load(card.model_directory).eval() for card in cards if card.model_directory}


def _sweep_pictures(inputs: ReportInputs, output: Path) -> dict[str, str]:
    """What a sweep drew, copied beside the page: its name in words, and a data URI."""
    found = {}
    for path in inputs.sweep_pictures:
        shutil.copyfile(path, output / path.name)
        name = path.stem.removeprefix("search_").replace("_", " ")
        found[name] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
    return found


def _galleries(
    inputs: ReportInputs, models: dict[str, torch.nn.Module], output: Path, config: ReportConfig
) -> list[Gallery]:
    found = [gallery(card, models.get(card.label), config.num_pictures) for card in inputs.models]
    shown = [one for one in found if one.examples]
    for number, one in enumerate(shown):
        write_sheet(one, output / f"pictures-{number}.png")
    return shown


def _responses(
    inputs: ReportInputs,
    galleries: list[Gallery],
    models: dict[str, torch.nn.Module],
    output: Path,
    config: ReportConfig,
) -> list[charts.Chart]:
    """Of the first model, whose activation all others got, or which got it as the others did."""
    card = inputs.models[0]
    if card.label not in models or all(one.card is not card for one in galleries):
        return []
    image = torch.from_numpy(card.evaluation.arrays(card.evaluation_directory)["picture/x"][:1]).float()
    return charts.response_curves(responses(models[card.label], image), output, dpi=config.png_dpi)


def _environment() -> Environment:
    templates = environment()
    templates.filters.update(percent=_percent, signed=_signed, big=_big, threat=_threat)
    templates.globals.update(icons=_ICONS, check_of=_check_of)
    return templates


def _percent(accuracy: Accuracy | None) -> str:
    return "–" if accuracy is None else f"{100 * accuracy.value:.1f}"


def _signed(share: float) -> str:
    """In points, with a minus sign as wide as the plus."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _big(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _threat(card: ModelCard) -> str:
    threat = card.evaluation.config.threat
    return f"{threat.norm}, eps {radius_label(threat.eps)}"


def _check_of(card: ModelCard, number: int) -> object:
    audit = card.evaluation.audit
    return next((check for check in audit.checks if check.number == number), None) if audit else None
