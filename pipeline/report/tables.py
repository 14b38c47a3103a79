"""The numbers as files: CSV for a spreadsheet, JSON for a program."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.artifacts import canonical, write_atomic
from pipeline.evaluation.stats import Accuracy, Difference
from pipeline.report.facts import Row, two_by_two
from pipeline.report.inputs import ReportInputs

Value = str | int | float | bool | None


def write_tables(inputs: ReportInputs, summary: Sequence[Row], output: Path) -> None:
    """Write every table of the page as CSV, and all records as one JSON."""
    tables: dict[str, list[dict[str, Value]]] = {
        "summary": [_summary(row) for row in summary],
        "transfer": [_transfer(inputs, row) for row in summary if row.gain is not None],
        "two_by_two": list(_two_by_two(summary)),
        "per_class": list(_per_class(inputs)),
        "curves": list(_curves(inputs)),
        "training": list(_training(inputs)),
        "audit": list(_audit(inputs)),
        "sweep": [
            {
                "trial": t.name,
                "n": inputs.models[0].num_validation,
                "clean": t.clean,
                "robust": t.robust,
                "best": t.best,
                **t.settings,
            }
            for t in inputs.trials
        ],
    }
    for name, lines in tables.items():
        if lines:
            _write_csv(output / f"{name}.csv", lines)
    write_atomic(output / "report.json", canonical({"inputs": inputs.model_dump(mode="json"), "tables": tables}) + "\n")


def _summary(row: Row) -> dict[str, Value]:
    card = row.card
    return {
        "model": card.label,
        "role": card.role,
        "activation": card.activation,
        "architecture": card.architecture,
        "dataset": card.dataset,
        "parameters": card.num_parameters,
        "flops_per_step": card.trained.flops_per_step,
        "images_per_second": card.trained.images_per_second,
        "n": row.clean.n,
        **_accuracy("clean", row.clean),
        **_accuracy("pgd", row.pgd),
        **_accuracy("autoattack", row.autoattack),
        **_accuracy("robust", row.robust),
        **_difference("robust_gain", row.gain),
        **_difference("clean_gain", row.clean_gain),
    }


def _transfer(inputs: ReportInputs, row: Row) -> dict[str, Value]:
    """One cell of the transfer matrix: the source's activation on a target, beside the control trained there."""
    origin, card, control = inputs.origin, row.card, inputs.control_of(row.card)
    return {
        "learned_on": origin.dataset,
        "learned_in": origin.architecture,
        "activation": card.activation,
        "frozen": card.role == "transfer",
        "target": card.target,
        "architecture": card.architecture,
        "dataset": card.dataset,
        "n": row.robust.n,
        **_accuracy("robust", row.robust),
        "control": control.activation if control else None,
        **_accuracy("control_robust", control.evaluation.union if control else None),
        **_difference("robust_gain", row.gain),
    }


def _two_by_two(summary: Sequence[Row]) -> Iterable[dict[str, Value]]:
    for (spatial, dependence), entries in two_by_two(summary).items():
        for entry in entries:
            yield {
                "activation": entry.name,
                "spatially": spatial,
                "input": dependence,
                "formula": entry.formula,
                "n": entry.robust.n if entry.robust else None,
                **_accuracy("clean", entry.clean),
                **_accuracy("robust", entry.robust),
            }


def _per_class(inputs: ReportInputs) -> Iterable[dict[str, Value]]:
    for card in inputs.models:
        for result in card.evaluation.per_class:
            yield {
                "model": card.label,
                "class": result.name,
                "n": result.clean.n,
                **_accuracy("clean", result.clean),
                **_accuracy("robust", result.robust),
            }


def _accuracy(name: str, accuracy: Accuracy | None) -> dict[str, Value]:
    if accuracy is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: accuracy.value, f"{name}_low": accuracy.low, f"{name}_high": accuracy.high}


def _difference(name: str, gain: Difference | None) -> dict[str, Value]:
    if gain is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_p": None}
    return {name: gain.value, f"{name}_low": gain.low, f"{name}_high": gain.high, f"{name}_p": gain.p_value}


def _curves(inputs: ReportInputs) -> Iterable[dict[str, Value]]:
    for card in inputs.models:
        for point in card.evaluation.curve:
            yield {
                "model": card.label,
                "eps": point.eps,
                "n": point.accuracy.n,
                **_accuracy("accuracy", point.accuracy),
            }


def _training(inputs: ReportInputs) -> Iterable[dict[str, Value]]:
    for card in inputs.models:
        for epoch in card.trained.history:
            yield {"model": card.label, "n": card.num_validation, **epoch.model_dump()}


def _audit(inputs: ReportInputs) -> Iterable[dict[str, Value]]:
    for card in inputs.models:
        for check in card.evaluation.audit.checks if card.evaluation.audit else ():
            yield {"model": card.label, **check.model_dump(exclude={"details"})}


_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def _write_csv(path: Path, lines: Sequence[Mapping[str, Value]]) -> None:
    fields = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in line.items()} for line in lines)
    write_atomic(path, text.getvalue())


def cell(value: Value) -> Value:
    """A value for a CSV file; a name that begins like a formula is quoted, a spreadsheet would run it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value
