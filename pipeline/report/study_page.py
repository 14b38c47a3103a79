"""A study's results as files: study.json (everything), results.csv, results.md, charts, and one HTML page."""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from pipeline.artifacts import write_atomic
from pipeline.report.cells import CELLS, PROPERTIES, TwoByTwo
from pipeline.report.charts import Chart, draw, percent
from pipeline.report.environment import environment
from pipeline.report.study import Comparison, Mean, Study, What
from pipeline.report.tables import cell
from pipeline.report.theme import CONTROL, MUTED, OURS
from sparta_models import ACTIVATIONS

RECORD, CSV, MARKDOWN, PAGE = "study.json", "results.csv", "results.md", "study.html"


def write_study(study: Study, output: Path, *, dpi: int = 150) -> list[Path]:
    """Write all files into `output` and return them."""
    output.mkdir(parents=True, exist_ok=True)
    charts = [_chart(study, group, number, output, dpi) for number, group in enumerate(study.groups)]
    for number in itertools.takewhile(lambda n: (output / f"study-{n}.png").is_file(), itertools.count(len(charts))):
        (output / f"study-{number}.png").unlink()  # of an earlier study with more groups
    facts = {
        "study": study,
        "overview": list(overview_rows(study)),
        "overview_columns": OVERVIEW_COLUMNS,
        "overview_reading": OVERVIEW_READING,
        "sentences": sentences,
        "tables": {group: table_rows(study, group) for group in study.groups},
        "columns": COLUMNS,
        "cells": {group: cell_rows(study, group) for group in study.groups},
        "cell_columns": CELL_COLUMNS,
        "cell_reading": CELL_READING,
        "reading": READING,
        "charts": charts,
    }
    page = environment().get_template("study.html").render(facts)
    write_atomic(output / RECORD, study.model_dump_json(indent=1) + "\n")
    write_atomic(output / CSV, _csv(study))
    write_atomic(output / MARKDOWN, markdown(study))
    write_atomic(output / PAGE, page)
    return [output / name for name in (RECORD, CSV, MARKDOWN, PAGE, *(f"{chart.name}.png" for chart in charts))]


LEADS: dict[What, str] = {"clean": "lead clean", "robust": "lead robust"}
COLUMNS = (
    *("contender", "activation", "cell", "seeds", "clean %", "robust %"),
    *LEADS.values(),
    *("parameters", "training PFLOP", "audit"),
)
READING = (
    "Robust: right under every attack. Brackets: 95 % t interval over seeds. "
    "Lead: sparta, on transfer targets frozen, minus this one, in points, paired by seed."
)
CELL_COLUMNS = ("2 x 2", "contenders", "clean %", "robust %")
CELL_READING = (
    "What each of the two properties brings: every cell is the mean over its contenders (those in the network of the "
    "main one, with its epochs), over the seeds that all of them have; the differences are paired by seed, in points."
)


OVERVIEW_COLUMNS = (
    *("group", "compared", "robust %", "robust lead", "clean %", "clean lead"),
    *("seeds", "clearly", "audit"),
)
OVERVIEW_READING = (
    "Accuracy of the two, over the seeds that both have, and the lead of the first in points, with its 95 % t interval "
    "over seeds. Clearly: whose interval leaves out zero. Audit: what those for gradient masking found; off: none."
)


def overview_rows(study: Study) -> Iterator[tuple[str, ...]]:
    """Every comparison that the study draws, one a row."""
    for group in study.groups:
        found = study.comparisons(group)
        for number, (robust, clean) in enumerate(zip(found[::2], found[1::2], strict=True)):
            audits = {entry.audit for name in (robust.a, robust.b) for entry in study.of(group, name)}
            yield (
                group if number == 0 else "",
                f"{robust.a} – {robust.b}",
                *_two_and_difference(robust),
                *_two_and_difference(clean),
                str(robust.over_seeds.num),
                _verdict(robust, clean),
                "; ".join(sorted(audits)),
            )


def _two_and_difference(comparison: Comparison) -> tuple[str, str]:
    one, other = comparison.means
    return f"{100 * one:.1f} / {100 * other:.1f}", interval(comparison.over_seeds, signed=True)


def _verdict(*comparisons: Comparison) -> str:
    clear = {c.what: "higher" if c.over_seeds.value > 0 else "lower" for c in comparisons if c.clear}
    if len(clear) == len(comparisons) and len(set(clear.values())) == 1:
        return f"both {clear['clean']}"
    return ", ".join(f"{what} {direction}" for what, direction in clear.items()) or "neither"


def table_rows(study: Study, group: str) -> list[tuple[str, ...]]:
    """The group's table, best robust accuracy first."""
    names = study.contenders(group)
    names.sort(key=lambda name: -study.mean(group, name, "robust").value)
    return [_row(study, group, name) for name in names]


def _row(study: Study, group: str, name: str) -> tuple[str, ...]:
    entries = study.of(group, name)
    first = entries[0]
    cell = ACTIVATIONS[first.activation].cell
    return (
        name,
        first.activation + (" (frozen)" if first.frozen_digest else ""),
        f"{cell.spatial}, {cell.dependence}",
        str(len(entries)),
        interval(study.mean(group, name, "clean")),
        interval(study.mean(group, name, "robust")),
        *(_lead(study, group, name, what) for what in LEADS),
        f"{first.num_parameters:,}",
        f"{first.training_flops / 1e15:.3g}",
        "; ".join(dict.fromkeys(f"{e.audit} ({e.audited})" if e.audited else e.audit for e in entries)),
    )


def _lead(study: Study, group: str, name: str, what: What) -> str:
    """What the main contender has more than this one, over the seeds that both have; – for itself, or without any."""
    seeds = {entry.seed for entry in study.of(group, name)}
    for main in study.with_role(group, "main"):
        if main != name and seeds & {entry.seed for entry in study.of(group, main)}:
            return interval(study.compare(group, main, name, what).over_seeds, signed=True)
    return "–"


def cell_rows(study: Study, group: str) -> list[tuple[str, ...]]:
    """The four cells, and what a step from one to the next brings; no rows where a cell has no contender."""
    cells = TwoByTwo(study, group)
    if not cells.whole:
        return []
    whats: tuple[What, ...] = ("clean", "robust")
    return [
        *(
            (", ".join(cell), ", ".join(cells.members[cell]), *(interval(cells.mean(cell, what)) for what in whats))
            for cell in CELLS
        ),
        *(
            (step, "", *(interval(cells.brings(one, other, what), signed=True) for what in whats))
            for step, one, other in PROPERTIES
        ),
    ]


def markdown(study: Study) -> str:
    """All comparisons and tables as Markdown; the same text for the same study."""
    return "\n".join([*overview(study), "", tables(study)])


def tables(study: Study) -> str:
    """The table of every group and what it says in words, as Markdown."""
    lines = [READING, ""]
    for group in study.groups:
        lines += [f"### {group}", "", f"{study.judges(group)}.", "", *grid(COLUMNS, table_rows(study, group))]
        lines += ["", *(f"- {line}" for line in sentences(study, group)), ""]
        if cells := cell_rows(study, group):
            lines += [CELL_READING, "", *grid(CELL_COLUMNS, cells), ""]
    return "\n".join(lines)


def overview(study: Study) -> list[str]:
    """All comparisons as a Markdown table, with how to read it, line by line."""
    return [OVERVIEW_READING, "", *grid(OVERVIEW_COLUMNS, overview_rows(study))]


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def sentences(study: Study, group: str) -> list[str]:
    """All comparisons of a group in words; of finalists also what the first judgement says on the same images."""
    found = [sentence(comparison) for comparison in study.comparisons(group)]
    if (first := study.first_judgement(group)) is not None:
        (origin,) = first.groups
        told = "; ".join(
            sentence(comparison) for comparison in first.comparisons(origin) if comparison.what == "robust"
        )
        found.append(f"on the same images by the attacks of {origin}: {told}")
    return found


def sentence(comparison: Comparison) -> str:
    """A comparison in words."""
    seeds, images = comparison.over_seeds, comparison.over_images
    verdict = "clear" if comparison.clear else "not clear"
    return (
        f"{comparison.a} minus {comparison.b}, {comparison.what}: {interval(seeds, signed=True)} points "
        f"over {seeds.num} seeds, {verdict}; over images {_brackets(images, '+.1f')}, p = {comparison.p_images:.2g}"
    )


def interval(mean: Mean, *, signed: bool = False) -> str:
    """Percent with its interval."""
    form = "+.1f" if signed else ".1f"
    if mean.num < 2:
        return format(100 * mean.value, form)
    return f"{100 * mean.value:{form}} {_brackets(mean, form)}"


def _brackets(mean: Mean, form: str) -> str:
    return f"[{100 * mean.low:{form}}, {100 * mean.high:{form}}]"


def _csv(study: Study) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = list(_records(study))
    writer.writerow(rows[0])
    writer.writerows([cell(value) for value in row.values()] for row in rows)
    return text.getvalue()


def _records(study: Study) -> Iterator[dict[str, Any]]:
    for entry in study.entries:
        record = entry.model_dump(exclude={"clean", "robust", "attacks", "correct_clean", "correct_robust"})
        yield record | {"n": entry.robust.n, "clean": entry.clean.value, "robust": entry.robust.value}


_SHAPES = "s^DvP*Xph<>d"
"""What tells contenders of one colour apart."""


def _chart(study: Study, group: str, number: int, output: Path, dpi: int) -> Chart:
    def paint(axes: Axes) -> None:
        shapes = itertools.cycle(_SHAPES)
        for name, *_ in table_rows(study, group):
            entries = study.of(group, name)
            role = entries[0].role
            colour = {"main": OURS, "control": CONTROL, "other": MUTED}[role]
            shape = next(shapes) if role == "other" else "o"
            clean, robust = ([entry.accuracy(what).value for entry in entries] for what in ("clean", "robust"))
            axes.plot(clean, robust, shape, color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
            axes.plot(_mean(clean), _mean(robust), shape, color=colour, markersize=8, label=name)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside: the means of many lie close together
        axes.xaxis.set_major_formatter(percent)
        axes.yaxis.set_major_formatter(percent)
        axes.margins(0.15)
        axes.set_xlabel("clean accuracy (large: mean over seeds)")
        axes.set_ylabel("robust accuracy")

    return draw(f"study-{number}", group, paint, output, dpi=dpi, size=(5.6, 4.2))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
