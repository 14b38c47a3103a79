"""The numbers of the report, worked out once: rows of the summary, comparisons with the controls, the 2 x 2."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.records import ClassResult
from pipeline.evaluation.stats import CONFIDENCE, Accuracy, Difference, difference, mcnemar
from pipeline.report.cells import CELLS
from pipeline.report.inputs import ModelCard, ReportInputs
from sparta_models import ACTIVATIONS
from sparta_models.activations.base import Cell


class Row(NamedTuple):
    """One line of the summary."""

    card: ModelCard
    clean: Accuracy
    pgd: Accuracy | None
    autoattack: Accuracy | None
    robust: Accuracy
    gain: Difference | None
    """Robust accuracy minus the control's."""
    clean_gain: Difference | None
    verdict: str


class CellEntry(NamedTuple):
    """One activation in the 2 x 2, and its result on the source's data where it was measured there."""

    name: str
    formula: str
    robust: Accuracy | None
    clean: Accuracy | None


class ClassTable(NamedTuple):
    """Accuracies by class of the models of one target."""

    target: str
    cards: tuple[ModelCard, ...]
    lines: tuple[tuple[str, tuple[ClassResult | None, ...]], ...]
    """Name of the class, and its result for each of `cards`; None where its evaluation saw none of it."""


def rows(inputs: ReportInputs) -> list[Row]:
    """The summary, one row per model."""
    return [_row(inputs, card) for card in inputs.models]


def _row(inputs: ReportInputs, card: ModelCard) -> Row:
    evaluation, control = card.evaluation, inputs.control_of(card)
    gain = None if control is None else compare(card, control, "union")
    return Row(
        card=card,
        clean=evaluation.clean,
        pgd=_attack(card, "pgd"),
        autoattack=_attack(card, "autoattack"),
        robust=evaluation.union,
        gain=gain,
        clean_gain=None if control is None else compare(card, control, "clean"),
        verdict="" if gain is None else verdict(gain),
    )


def verdict(gain: Difference) -> str:
    """What a difference allows to say, at 95 % confidence: by its interval and, where paired, by the exact test."""
    chance = gain.p_value is not None and gain.p_value > 1 - CONFIDENCE
    if chance or gain.low <= 0 <= gain.high:
        return "no clear difference"
    return "higher" if gain.value > 0 else "lower"


def compare(card: ModelCard, control: ModelCard, what: str) -> Difference:
    """Difference of two accuracies: paired where both were judged on the same examples, else from the counts alone."""
    pair = [_correct(one, what) for one in (card, control)]
    same = card.evaluation.data_digest == control.evaluation.data_digest
    if same and pair[0].shape == pair[1].shape:
        return mcnemar(pair[0], pair[1])
    field = "union" if what == "union" else "clean"
    return difference(getattr(card.evaluation, field), getattr(control.evaluation, field))


def _correct(card: ModelCard, what: str) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    return card.evaluation.arrays(card.evaluation_directory)[f"correct/{what}"].astype(bool)


def _attack(card: ModelCard, kind: str) -> Accuracy | None:
    """Accuracy after the last attack of a kind, None where there was none."""
    found = [attack.accuracy for attack in card.evaluation.attacks if attack.name.startswith(kind)]
    return found[-1] if found else None


def two_by_two(summary: Iterable[Row]) -> dict[Cell, list[CellEntry]]:
    """Every activation in its cell, with the result on the source's data where it was measured there."""
    results: dict[str, Row] = {}
    for row in summary:
        results.setdefault(row.card.activation, row)
    cells: dict[Cell, list[CellEntry]] = {cell: [] for cell in CELLS}
    for name, kind in ACTIVATIONS.items():
        found = results.get(name)
        entry = CellEntry(name, kind.formula, found.robust if found else None, found.clean if found else None)
        cells[kind.cell].append(entry)
    return {cell: sorted(entries, key=lambda entry: entry.robust is None) for cell, entries in cells.items()}


def per_class(inputs: ReportInputs) -> list[ClassTable]:
    """Accuracies by class, one table per target; without those whose evaluations have none."""
    tables = []
    for target in dict.fromkeys(card.target for card in inputs.models):
        cards = [card for card in inputs.models if card.target == target and card.evaluation.per_class]
        found = [{result.name: result for result in card.evaluation.per_class} for card in cards]
        names = dict.fromkeys(name for results in found for name in results)
        lines = tuple((name, tuple(results.get(name) for results in found)) for name in names)
        if lines:
            tables.append(ClassTable(target, tuple(cards), lines))
    return tables


def check_names(inputs: ReportInputs) -> list[tuple[int, str]]:
    """Number and name of every audit check that any model had."""
    audits = [card.evaluation.audit for card in inputs.models if card.evaluation.audit]
    return sorted({(check.number, check.name) for audit in audits for check in audit.checks})
