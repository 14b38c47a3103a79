"""A study's statistics against numbers worked out by hand, and its files."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.data.sample import sample
from pipeline.evaluation.stats import Accuracy
from pipeline.report.cells import TwoByTwo
from pipeline.report.study import Entry, Mean, Role, Study
from pipeline.report.study_page import (
    CELL_READING,
    COLUMNS,
    OVERVIEW_COLUMNS,
    _verdict,
    cell_rows,
    markdown,
    overview_rows,
    sentences,
    table_rows,
    write_study,
)
from sparta_models import ACTIVATIONS
from sparta_models.activations.base import Cell

N = 40
ACTIVATION_OF = {"frozen": "sparta", "control": "relu", "longer": "relu"}


def entry(contender: str, seed: int, num_robust: int, *, role: Role = "other", group: str = "home") -> Entry:
    clean, robust = np.arange(N) < 36, np.arange(N) < num_robust
    return Entry(
        group=group,
        contender=contender,
        role=role,
        activation=ACTIVATION_OF.get(contender, contender if contender in ACTIVATIONS else "silu"),
        seed=seed,
        architecture="resnet8 width=4",
        dataset="digits",
        num_parameters=1234,
        training_flops=2e15,
        epochs=3,
        precision="bf16",
        val_clean=0.9,
        val_robust=0.5,
        split_size=2 * N,
        clean=Accuracy.of(36, N),
        robust=Accuracy.of(num_robust, N),
        trained_by="pgd_at at linf 0.1",
        judged_under="linf 0.1",
        attacks={"pgd-ce-20x1": num_robust / N},
        audit="passed",
        audited="quick, 64 images",
        trained="a" * 64,
        evaluated="b" * 64,
        weights_sha256="c" * 64,
        frozen_digest="d" * 64 if contender == "frozen" else None,
        correct_clean=clean,
        correct_robust=robust,
    )


def study() -> Study:
    return Study(
        name="a <b>study</b>",
        entries=(
            *(entry("sparta", seed, n, role="main") for seed, n in enumerate((24, 26, 25))),
            *(entry("control", seed, n, role="control") for seed, n in enumerate((20, 20, 20))),
            *(entry("weak", seed, n) for seed, n in enumerate((10, 11, 12))),
            *(entry("strong", seed, n) for seed, n in enumerate((30, 20, 25))),
        ),
    )


def test_mean_has_the_t_interval_of_its_seeds() -> None:
    mean = Mean.of([0.5, 0.6, 0.7])
    half = 4.302653 * 0.1 / 3**0.5
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert Mean.of([0.5]).low == -np.inf


def test_the_interval_of_an_accuracy_ends_at_none_and_all() -> None:
    found = Study(name="s", entries=(entry("sparta", 0, 1), entry("sparta", 1, N - 1)))
    mean = found.mean("home", "sparta", "robust")
    assert (mean.low, mean.high) == (0.0, 1.0)


GAPS = np.array([0] * 20 + [1] * 4 + [2 / 3] + [1 / 3] + [0] * 14)  # of sparta and control, image by image


def test_differences_are_paired_by_seed() -> None:
    found = study().compare("home", "sparta", "control", "robust")
    gaps = np.array([4, 6, 5]) / N
    low, high = stats.t.interval(0.95, 2, gaps.mean(), gaps.std(ddof=1) / 3**0.5)
    assert (found.over_seeds.value, found.over_seeds.low, found.over_seeds.high) == pytest.approx((5 / N, low, high))
    assert found.clear
    low, high = stats.t.interval(0.95, N - 1, 5 / N, GAPS.std(ddof=1) / N**0.5)
    assert (found.over_images.value, found.over_images.low, found.over_images.high) == pytest.approx((5 / N, low, high))


def test_differences_that_happen_to_be_equal_are_not_clear() -> None:
    entries = [entry(name, seed, num) for seed in (0, 1) for name, num in (("sparta", 21), ("relu", 20))]
    found = Study(name="s", entries=tuple(entries)).compare("home", "sparta", "relu", "robust")
    assert found.over_seeds.low == found.over_seeds.high == pytest.approx(1 / N)
    assert not found.clear


def test_a_seed_that_only_one_has_is_left_out() -> None:
    more = Study(name="x", entries=(*study().entries, entry("sparta", 7, 40, role="main")))
    assert more.compare("home", "sparta", "control", "robust") == study().compare("home", "sparta", "control", "robust")
    with pytest.raises(ValueError, match="share a seed"):
        Study(name="x", entries=(entry("a", 0, 1), entry("b", 1, 1))).compare("home", "a", "b", "robust")


def test_p_over_images_is_that_of_a_paired_t_test() -> None:
    one, other = study().of("home", "strong"), study().of("home", "control")
    gaps = np.mean([a.correct_robust.astype(float) - b.correct_robust for a, b in zip(one, other, strict=True)], axis=0)
    found = study().compare("home", "strong", "control", "robust")
    assert found.p_images == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    assert study().compare("home", "strong", "control", "clean").p_images == 1.0


def test_the_main_contender_is_compared_with_the_control_and_the_strongest_others() -> None:
    found = [(c.a, c.b, c.what) for c in study().comparisons("home")]
    assert found == [("sparta", b, what) for b in ("control", "strong", "weak") for what in ("robust", "clean")]


def test_what_the_control_reaches_with_more_is_compared_too() -> None:
    more = [entry(name, seed, 1) for name in ("longer", "other", "third") for seed in range(3)]
    more.append(entry("relu", 7, 3))  # the control's activation, of a seed that the main contender has not
    found = Study(name="x", entries=(*study().entries, *more)).comparisons("home")
    assert [c.b for c in found[::2]] == ["control", "longer", "strong", "weak"]


def test_the_overview_has_every_comparison_with_its_verdict() -> None:
    late = entry("control", 7, 0, role="control")  # a seed that the main contender has not
    weak = [e.model_copy(update={"audit": "losses"}) for e in study().of("home", "weak")]
    kept = [e for e in study().entries if e.contender != "weak"]
    rows = list(overview_rows(Study(name="x", entries=(*kept, *weak, late))))
    assert len(OVERVIEW_COLUMNS) == len(rows[0])
    shown = [
        [row[OVERVIEW_COLUMNS.index(name)] for name in ("group", "compared", "robust %", "clearly", "audit")]
        for row in rows
    ]
    assert shown == [
        ["home", "sparta – control", "62.5 / 50.0", "robust higher", "passed"],
        ["", "sparta – strong", "62.5 / 62.5", "neither", "passed"],
        ["", "sparta – weak", "62.5 / 27.5", "robust higher", "losses; passed"],
    ]
    (low, high) = (
        study().compare("home", "sparta", "control", "robust").over_seeds.model_dump()[e] for e in ("low", "high")
    )
    assert rows[0][3] == f"+12.5 [{100 * low:+.1f}, {100 * high:+.1f}]"
    down = changed(part("sparta"), contender="other", role="other")
    found = Study(name="x", entries=(*changed(part("weak"), role="main").entries, *down.entries))
    assert next(overview_rows(found))[OVERVIEW_COLUMNS.index("clearly")] == "robust lower"


def test_a_verdict_names_what_is_clear() -> None:
    higher, undecided = (study().compare("home", "sparta", name, "robust") for name in ("control", "strong"))
    clean_higher, clean_undecided = (found.model_copy(update={"what": "clean"}) for found in (higher, undecided))
    clean_lower = study().compare("home", "weak", "sparta", "robust").model_copy(update={"what": "clean"})
    assert _verdict(higher, clean_higher) == "both higher"
    assert _verdict(higher, clean_undecided) == "robust higher"
    assert _verdict(undecided, clean_lower) == "clean lower"
    assert _verdict(higher, clean_lower) == "robust higher, clean lower"
    assert _verdict(undecided, clean_undecided) == "neither"


def test_the_table_has_the_lead_over_every_other_contender() -> None:
    alone = entry("alone", 7, 3)
    rows = {row[0]: row for row in table_rows(Study(name="x", entries=(*study().entries, alone)), "home")}
    low, high = (
        f"{100 * end:+.1f}" for end in stats.t.interval(0.95, 2, 5 / N, np.std([4, 6, 5], ddof=1) / N / 3**0.5)
    )
    assert {name: row[COLUMNS.index("lead robust")] for name, row in rows.items() if name != "strong"} == {
        "sparta": "–",
        "control": f"+12.5 [{low}, {high}]",
        "weak": "+35.0 [+28.8, +41.2]",
        "alone": "–",
    }
    assert rows["strong"][COLUMNS.index("lead clean")] == "+0.0 [+0.0, +0.0]"


SQUARE = {"sparta": (24, 26), "frelu": (20, 26), "meta_acon": (18, 18), "position_prelu": (16, 20), "control": (12, 16)}


def square(*left_out: str) -> Study:
    robust = {"strong": (16, 20), **SQUARE}
    roles: dict[str, Role] = {"sparta": "main", "control": "control"}
    entries = [
        entry(name, seed, n, role=roles.get(name, "other")).model_copy(update={"architecture": "net"})
        for name in robust.keys() - set(left_out)
        for seed, n in enumerate(robust[name])
    ]
    longer = entry("longer", 0, 40).model_copy(update={"architecture": "net", "epochs": 4})
    wider = entry("longer", 0, 40).model_copy(update={"contender": "wider"})
    third = entry("control", 2, 40, role="control").model_copy(update={"architecture": "net"})
    return Study(name="x", entries=(*entries, longer, wider, third))


def bounds(mean: Mean) -> tuple[float, ...]:
    return mean.value, mean.low, mean.high, mean.num


def test_what_a_property_brings_is_the_difference_of_two_cells_seed_by_seed() -> None:
    cells = TwoByTwo(square(), "home")
    assert {", ".join(cell): sorted(names) for cell, names in cells.members.items()} == {
        "shared, independent": ["control", "strong"],  # neither another network nor more epochs
        "shared, dependent": ["meta_acon"],
        "varying, independent": ["position_prelu"],
        "varying, dependent": ["frelu", "sparta"],
    }
    assert cells.seeds == [0, 1]
    varying = {d: cells.brings(Cell("varying", d), Cell("shared", d), "robust") for d in ("independent", "dependent")}
    assert bounds(varying["independent"]) == pytest.approx(bounds(Mean.of([(16 - 14) / N, (20 - 18) / N])))
    assert bounds(varying["dependent"]) == pytest.approx(bounds(Mean.of([(22 - 18) / N, (26 - 18) / N])))
    text = markdown(square())
    assert "| varying minus shared, input independent |  | +0.0 [+0.0, +0.0] | +5.0 [+5.0, +5.0] |" in text
    assert "| shared, dependent | meta_acon | 90.0 [90.0, 90.0] | 45.0 [45.0, 45.0] |" in text


@pytest.mark.parametrize("left_out", ["sparta", "meta_acon", "position_prelu"])
def test_without_a_cell_there_is_no_square(left_out: str, tmp_path: Path) -> None:
    assert cell_rows(square(left_out), "home") == []
    write_study(square(left_out), tmp_path)
    assert CELL_READING not in (tmp_path / "study.html").read_text()
    write_study(square(), tmp_path)
    assert CELL_READING in (tmp_path / "study.html").read_text()


def test_everything_is_in_study_json(tmp_path: Path) -> None:
    files = write_study(study(), tmp_path)
    assert all(path.stat().st_size > 0 for path in files)
    again = Study.load(tmp_path / "study.json")
    assert markdown(again) == (tmp_path / "results.md").read_text() == markdown(study())
    judges = f"judged under linf 0.1 on {N:,} test images; attacks: pgd-ce-20x1."
    assert f"digits; trained by pgd_at at linf 0.1, in bf16; {judges}" in markdown(again)
    assert again.model_dump_json() == study().model_dump_json()
    assert (tmp_path / "results.csv").read_text().count("\n") == 13


def test_page_escapes_names_and_asks_for_nothing_outside(tmp_path: Path) -> None:
    write_study(study(), tmp_path)
    page = (tmp_path / "study.html").read_text()
    assert "a &lt;b&gt;study&lt;/b&gt;" in page
    assert "<b>study" not in page
    assert 'src="http' not in page


def test_altered_bits_are_refused() -> None:
    text = study().model_dump_json().replace("40:", "90:", 1)
    with pytest.raises(ValueError, match="packed bits"):
        Study.model_validate_json(text)


def part(*contenders: str, group: str = "home") -> Study:
    whole = study()
    entries = (e.model_copy(update={"group": group}) for e in whole.entries if e.contender in contenders)
    return whole.model_copy(update={"entries": tuple(entries)})


def changed(entries: Study, **values: object) -> Study:
    return entries.model_copy(update={"entries": tuple(e.model_copy(update=values) for e in entries.entries)})


def test_parts_of_a_study_are_joined() -> None:
    joined = part("sparta", "control").joined(part("strong", "sparta")).joined(part("sparta", "weak"))
    assert joined.contenders("home") == ["sparta", "control", "strong", "weak"]
    assert joined.comparisons("home") == study().comparisons("home")
    assert joined.joined(part("sparta", group="away")).groups == ["home", "away"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trained": "f" * 64}, "home sparta 0: expected the training aaaaaaaaaaaa, got ffffffffffff; .* whole group"),
        ({"evaluated": "f" * 64}, "home sparta 0: expected the evaluation bbbbbbbbbbbb, got ffffffffffff"),
        ({"weights_sha256": "f" * 64}, "home sparta 0: expected the weights cccccccccccc, got ffffffffffff"),
        ({"correct_clean": np.arange(N) < 24}, "home sparta 0: expected the images that are right clean 40:"),
        ({"correct_robust": np.arange(N) < 9}, "home sparta 0: expected the images that are right under attack 40:"),
        ({"seed": 7}, "expected a network of home that both parts have, to compare them by, got none"),
    ],
)
def test_a_part_that_cannot_be_compared_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study().joined(changed(part("sparta"), **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attacks": {"weak": 0.5}}, "expected home to be judged on .*'pgd-ce-20x1'.*, got .*'weak'"),
        ({"dataset": "other"}, "expected home to be judged on .*'digits'.*, got .*'other'"),
        ({"judged_under": "linf 0.2"}, "expected home to be judged on .*'linf 0.1'.*, got .*'linf 0.2'"),
        ({"trained_by": "standard"}, "expected home to be judged on .*'pgd_at at linf 0.1'.*, got .*'standard'"),
    ],
)
def test_what_was_judged_in_another_way_does_not_stand_in_one_table(values: dict[str, object], message: str) -> None:
    other = part("strong").entries[0].model_copy(update=values)
    with pytest.raises(ValueError, match=message):
        Study(name="x", entries=(*part("sparta").entries, other))


@pytest.mark.parametrize(
    "values",
    [
        {"activation": "gelu"},
        {"architecture": "resnet50"},
        {"num_parameters": 9},
        {"epochs": 60},
        {"precision": "fp32"},
        {"role": "control"},
        {"frozen_digest": "d" * 64},
    ],
)
def test_seeds_of_another_network_do_not_stand_in_one_row(values: dict[str, object]) -> None:
    more = changed(part("strong"), seed=7, **values)
    with pytest.raises(ValueError, match=r"expected home strong 7 to be .*'silu', 'resnet8 width=4', 1234, 3, 'bf16'"):
        study().joined(part("sparta").model_copy(update={"entries": (*part("sparta").entries, more.entries[0])}))


def test_the_strongest_other_has_all_seeds() -> None:
    lucky = entry("lucky", 0, 40)
    more = Study(name="x", entries=(*study().entries, lucky))
    assert more.with_role("home", "other") == ["strong", "weak", "lucky"]


def finals(n: int = 30) -> Study:
    """The study, with a second and harder judgement of two contenders on the first n images."""
    names = (("sparta", "main", 16), ("control", "control", 14))
    again = [
        entry(name, seed, robust, role=role, group="home: finalists")
        for name, role, robust in names
        for seed in range(3)
    ]
    cut = [
        e.model_copy(
            update={
                "correct_clean": e.correct_clean[:n],
                "correct_robust": e.correct_robust[:n],
                "clean": Accuracy.of(int(e.correct_clean[:n].sum()), n),
                "robust": Accuracy.of(int(e.correct_robust[:n].sum()), n),
            }
        )
        for e in again
    ]
    return Study(name="x", entries=(*study().entries, *cut))


def test_of_finalists_the_page_says_what_the_first_judges_found_on_the_same_images() -> None:
    first = finals(23).first_judgement("home: finalists")
    assert first is not None
    assert [e.robust.correct for e in first.of("home", "sparta")] == [23, 23, 23]
    assert [e.robust.correct for e in first.of("home", "control")] == [20, 20, 20]
    line = sentences(finals(23), "home: finalists")[-1]
    assert line.startswith("on the same images by the attacks of home: sparta minus control, robust: +13.0 [+13.0")
    assert study().first_judgement("home") is None


def test_of_a_whole_test_split_the_finalists_images_are_found_where_they_stand() -> None:
    chosen = sample(N, 23)
    update = {"split_size": N, "correct_clean": np.ones(N, bool), "clean": Accuracy.of(N, N)}
    firsts = [e.model_copy(update=update) for e in study().entries if e.contender in ("sparta", "control")]
    finals_ = [
        e.model_copy(
            update={
                "group": "home: finalists",
                "correct_clean": np.ones(23, bool),
                "clean": Accuracy.of(23, 23),
                "correct_robust": e.correct_robust[chosen],
                "robust": Accuracy.of(int(e.correct_robust[chosen].sum()), 23),
            }
        )
        for e in firsts
    ]
    first = Study(name="x", entries=(*firsts, *finals_)).first_judgement("home: finalists")
    assert first is not None
    for entry_, final in zip(first.entries, finals_, strict=True):
        assert np.array_equal(entry_.correct_robust, final.correct_robust)
        assert not np.array_equal(entry_.correct_robust, firsts[0].correct_robust[:23])


def test_another_image_or_network_is_not_compared() -> None:
    whole = finals()
    other = whole.entries[-1].model_copy(update={"correct_clean": ~whole.entries[-1].correct_clean})
    assert Study(name="x", entries=(*whole.entries[:-1], other)).first_judgement("home: finalists") is None
    entries = [e for e in whole.entries if e.key != ("home", "control", 1)]
    assert Study(name="x", entries=tuple(entries)).first_judgement("home: finalists") is None
    retrained = whole.entries[-1].model_copy(update={"weights_sha256": "f" * 64})
    assert Study(name="x", entries=(*whole.entries[:-1], retrained)).first_judgement("home: finalists") is None
