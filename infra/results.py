"""Write what README and docs/results.md quote from the study in results/; a test compares, so no figure can go stale.

    python infra/results.py --take RUNS                  # after `make study`: results/ anew
    python infra/results.py --add RUNS                   # after a part of it: its networks beside those of results/
    python infra/results.py --sweep RUNS [RUNS ...]      # after a search, of each seed: its trials into results/sweep
    python infra/results.py --ship NAME RUNS             # ship its best activation as a pretrained bank
    python infra/results.py                              # only write the quotations again

RUNS is the folder of the study's chain, e.g. runs/study. A network that results/ has already is kept. The finalists'
networks are copied to results/networks, for others to attack. The best activation is that of the seed with the highest
robust accuracy on validation images. A shipped bank's card is made of the study's figures too.
"""

import argparse
import csv
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.artifacts import MODEL, load_record  # noqa: E402
from pipeline.artifacts import RECORD as STAGE_RECORD  # noqa: E402
from pipeline.cluster.sweep.results import COLUMNS as TRIAL_COLUMNS  # noqa: E402
from pipeline.cluster.sweep.results import ERROR, TABLE  # noqa: E402
from pipeline.report.study import FINALISTS, Entry, Mean, Study  # noqa: E402
from pipeline.report.study_page import (  # noqa: E402
    RECORD,
    grid,
    interval,
    overview,
    tables,
    write_study,
)
from pipeline.training.model_io import load_model, model_sha256  # noqa: E402
from sparta_models import ActivationBank, pretrained_banks  # noqa: E402
from sparta_models.bank import PRETRAINED  # noqa: E402

RESULTS = ROOT / "results"
SWEEP = RESULTS / "sweep"
NETWORKS = RESULTS / "networks"
OVERVIEW, ALL = "overview", "results"
"""The blocks of README and docs/results.md that are written here."""
CARD = "card.md"


def study() -> Study:
    """The study whose files lie in results/."""
    return Study.load(RESULTS / RECORD)


def output(runs: Path, stage: str, branch: str) -> Path:
    """Where a stage of a finished chain left its files."""
    folder = runs / stage / branch
    return folder / (folder / "current.txt").read_text().strip()


def of(runs: Path) -> Study:
    """The study, or the part of one, that a chain has finished."""
    return Study.load(output(runs, "report", "study") / RECORD)


def add(runs: Path) -> None:
    """Put the networks of a part into results/, beside those that were there and came out the same."""
    known, part = study(), of(runs)
    joined = known.joined(part)
    write_study(joined, RESULTS)
    added = len(joined.entries) - len(known.entries)
    print(f"{added} networks added; {len(part.entries) - added} were there, and came out the same to the last bit")


def finalists(found: Study) -> dict[str, Entry]:
    """The networks that the study's main claim is about, by the names of their branches."""
    return {f"{e.contender}-s{e.seed}": e for e in found.entries if e.group == f"{found.groups[0]}{FINALISTS}"}


def take_networks(runs: Path) -> None:
    """Copy the finalists' networks of a chain, where they are those that were judged."""
    for name, entry in finalists(study()).items():
        network = output(runs, "pretrain", name) / MODEL
        if model_sha256(network) == entry.weights_sha256:
            shutil.copytree(network, NETWORKS / name, dirs_exist_ok=True, copy_function=shutil.copyfile)


def take_sweeps(chains: list[Path]) -> None:
    """Copy what the searches of several seeds left, with their records, in place of earlier ones."""
    found = {folder: load_record(folder) for folder in (output(runs, "search", "best") for runs in chains)}
    for folder, record in found.items():
        if record is None or not (folder / TABLE).is_file():
            raise SystemExit(f"expected a finished search in {folder}, got none")
    shutil.rmtree(SWEEP, ignore_errors=True)
    for folder, record in found.items():
        assert record is not None
        kept = SWEEP / f"s{record.inputs['sections']['seed']}"
        kept.mkdir(parents=True)
        for name in (STAGE_RECORD, *record.outputs):
            shutil.copyfile(folder / name, kept / name)


Trial = dict[str, str]


def sweep(folder: Path = SWEEP) -> list[str]:
    """For docs/results.md: what every value of a sweep reached over the seeds, what a step to the next one brings, and
    every setting."""
    kept = {path: record for path in sorted(folder.glob("s*")) if (record := load_record(path)) is not None}
    if not kept:
        return []
    records, seeds = list(kept.values()), [list(_trials(path)) for path in kept]
    settings = records[0].inputs["sections"]
    names = [name for name in seeds[0][0] if name not in (*TRIAL_COLUMNS, ERROR)]
    grid_points = [{name: trial[name] for name in names} for trial in sorted(seeds[0], key=lambda t: int(t["trial"]))]
    rows = []
    for name in names:
        values = sorted({trial[name] for trials in seeds for trial in trials}, key=_order)
        for value in values:
            rows.append((name, _value(name, value), *(interval(m) for m in _reached(seeds, {name: value}))))
        for low, high in itertools.pairwise(values):
            step = _reached(seeds, {name: high}, {name: low})
            rows.append(
                (name, f"{_value(name, high)} – {_value(name, low)}", *(interval(m, signed=True) for m in step))
            )
    return [
        "### A sweep",
        "",
        f"{len(seeds[0])} trials of {settings['search']['epochs'] or settings['training']['epochs']} epochs over "
        f"{', '.join(names)}, {len(seeds)} seeds, judged on validation images; a value's mean is over its trials, seed "
        f"by seed. Searches {', '.join(f'`{record.fingerprint[:12]}`' for record in records)}.",
        "",
        *grid(("setting", "value", "clean %", "robust %"), rows),
        "",
        *grid(
            (*names, "clean %", "robust %"),
            [
                (*(_value(*pair) for pair in where.items()), *(interval(m) for m in _reached(seeds, where)))
                for where in grid_points
            ],
        ),
        "",
    ]


def _trials(folder: Path) -> Iterator[Trial]:
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        yield from (trial for trial in csv.DictReader(file) if trial["robust"])


def _reached(seeds: list[list[Trial]], where: Trial, less: Trial | None = None) -> list[Mean]:
    """Clean and robust accuracy of trials with these values, maybe less that of others, over seeds that have both."""
    found = []
    for what in ("clean", "robust"):
        of_seeds = []
        for trials in seeds:
            chosen = [
                [float(t[what]) for t in trials if wanted.items() <= t.items()] for wanted in (where, less or where)
            ]
            if all(chosen):
                one, other = (sum(values) / len(values) for values in chosen)
                of_seeds.append(one - other if less else one)
        found.append(Mean.of(of_seeds))
    return found


def _order(text: str) -> tuple[float, str]:
    """Numbers by size, words behind them."""
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def _value(name: str, text: str) -> str:
    number, word = _order(text)
    if word or not text:
        return word or "–"
    return f"{255 * number:.3g}/255" if name.rpartition(".")[2] == "eps" else f"{number:.4g}"


def whole(found: Study) -> str:
    """For docs/results.md: the table of every group, and what every row was trained and judged as."""
    rows = [
        (e.group, e.contender, str(e.seed), *(f"`{p[:12]}`" for p in (e.trained, e.evaluated, e.weights_sha256)))
        for e in found.entries
    ]
    prints = grid(("group", "contender", "seed", "training", "evaluation", "weights"), rows)
    return "\n".join([tables(found), *sweep(), "### Where the figures come from", "", *prints])


def quotations(found: Study) -> dict[str, dict[str, str]]:
    """What stands between which marks of which file."""
    short = "\n".join(overview(found))
    return {"README.md": {OVERVIEW: short}, "docs/results.md": {OVERVIEW: short, ALL: whole(found)}}


def updated(text: str, name: str, block: str) -> str:
    """The text with the block between the two marks of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected the marks {begin} and {end}, got none")
    return f"{before}{begin}\n{block}\n{end}{after}"


def card(name: str, entries: list[Entry]) -> str:
    """What a shipped bank is, what its network reached, and what it is not."""
    first = entries[0]
    rows = [(e.group, str(e.clean), str(e.robust), e.audit, f"`{e.evaluated[:12]}`") for e in entries]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"The activation of {first.architecture}, trained adversarially on {first.dataset} "
            f"({first.epochs} epochs, {first.trained_by}), seed {first.seed}, chosen on validation images.",
            "",
            "```python",
            "from sparta_models import ActivationBank, build_model",
            "",
            'network = build_model("resnet14", width=16, activation="relu")',
            f'ActivationBank.pretrained("{name}").apply_to(network)  # frozen; train the rest of the network',
            "```",
            "",
            "What the network that it was trained in reached on test images:",
            "",
            *grid(("judged in", "clean %", "robust %", "audit", "evaluation"), rows),
            "",
            f"Training `{first.trained[:12]}`, weights `{first.weights_sha256[:12]}`.",
            "",
            "Limits: an activation makes no network robust by itself; the network around it has to be trained "
            "adversarially. Trained on few and small images for few epochs: an example of a transferable activation, "
            "not a record. Other widths need `adapt`; other threat models were not tried. On other data it may cost "
            "accuracy against its form untrained, as it did on traffic signs.",
            "",
        ]
    )


def ship(name: str, runs: Path) -> None:
    """Save the activation of the study's best source network."""
    found = study()
    best = max(found.of(found.groups[0], "sparta"), key=lambda e: e.val_robust)
    directory = output(runs, "pretrain", f"sparta-s{best.seed}") / MODEL
    if model_sha256(directory) != best.weights_sha256:
        raise SystemExit(f"expected the weights that were judged, {best.weights_sha256[:12]}, in {directory}")
    network = load_model(directory)
    source = {
        "dataset": best.dataset,
        "threat_model": best.trained_by,
        "training": best.trained,
        "weights_sha256": best.weights_sha256,
    }
    shutil.rmtree(PRETRAINED / name, ignore_errors=True)
    ActivationBank.from_model(network, source=source).save(PRETRAINED / name)


def write_cards() -> None:
    """The cards of all shipped banks."""
    for name in pretrained_banks():
        if entries := shipped(name):
            (PRETRAINED / name / CARD).write_text(card(name, entries), encoding="utf-8")
        else:
            print(f"{name}: its network is not in the study; ship one that is (--ship {name} RUNS)")


def shipped(name: str) -> list[Entry]:
    """What the study says of the network that a shipped bank was trained in."""
    training = ActivationBank.pretrained(name).source["training"]
    return [entry for entry in study().entries if entry.role == "main" and entry.trained == training]


def main() -> None:
    """Take a study in, ship a bank, and write the blocks, as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="RUNS")
    parser.add_argument("--add", type=Path, metavar="RUNS")
    parser.add_argument("--sweep", type=Path, nargs="+", metavar="RUNS")
    parser.add_argument("--ship", nargs=2, metavar=("NAME", "RUNS"))
    args = parser.parse_args()
    if args.take:
        write_study(of(args.take), RESULTS)
    if args.add:
        add(args.add)
    if args.take or args.add:
        take_networks(args.take or args.add)
    if args.sweep:
        take_sweeps(args.sweep)
    found = study()
    for name, blocks in quotations(found).items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        for mark, block in blocks.items():
            text = updated(text, mark, block)
        path.write_text(text, encoding="utf-8")
    if args.ship:
        ship(args.ship[0], Path(args.ship[1]))
    write_cards()


if __name__ == "__main__":
    main()
