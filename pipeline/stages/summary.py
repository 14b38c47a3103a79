"""The last lines that a chain prints: the table of results, what failed, and where to look."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

from pipeline.config.chain import ChainConfig
from pipeline.evaluation.records import Evaluation
from pipeline.evaluation.stats import Accuracy
from pipeline.report import PAGE as REPORT
from pipeline.report.study_page import MARKDOWN
from pipeline.report.study_page import PAGE as STUDY
from pipeline.stages.graph import reported_models
from pipeline.stages.node import Finished
from pipeline.stages.report import ReportedModel

_COLUMNS = ("model", "role", "network", "activation", "data", "n", "clean % [95 %]", "robust % [95 %]", "audit")


def closing_lines(config: ChainConfig, output: Path, done: Mapping[str, Finished], failed: Mapping[str, str]) -> str:
    """The table of all evaluated models, the failures, and the paths of the report and the MLflow UI."""
    models = reported_models(config) if config.study is None else ()
    rows = [_row(model, done) for model in models if model.evaluation in done]
    lines: list[str] = []
    if study := done.get("report:study"):
        lines += ["", (study.directory / MARKDOWN).read_text(encoding="utf-8").rstrip()]
    if rows:
        robust = f"robust: per-example worst case over all attacks, {config.evaluation.threat.label}"
        lines += ["", *_table([_COLUMNS, *rows]), f"{robust}; n: test images"]
    if failed:
        reasons = (f"  {key}: {shorten(reason, 200, placeholder=' ...')}" for key, reason in failed.items())
        lines += ["", f"{len(failed)} not done:", *reasons]
    lines.append("")
    if study:
        lines.append(f"study      {output / STUDY}")
    if "report:page" in done:
        lines.append(f"report     {output / REPORT}")
    lines.append(f"results    {output}")
    lines.append("MLflow UI  make ui")
    return "\n".join(lines)


def _row(model: ReportedModel, done: Mapping[str, Finished]) -> tuple[str, ...]:
    result = Evaluation.load(done[model.evaluation].directory)
    network = model.task.model
    frozen = " (frozen)" if model.task.bank else ""
    audit = (
        "off"
        if result.audit is None
        else "passed"
        if result.audit.passed
        else f"FAILED: {', '.join(result.audit.failed)}"
    )
    activation = model.activation + frozen
    accuracies = (_interval(result.clean), _interval(result.union))
    return (model.branch, model.role, network.name, activation, result.dataset, str(result.n), *accuracies, audit)


def _interval(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.value:.1f} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
