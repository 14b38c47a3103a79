"""A study's statistics against numbers worked out by hand, and its files."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation.stats import Accuracy
from pipeline.report.study import Entry, Mean, Role, Study
from pipeline.report.study_page import markdown, write_study

N = 40


def entry(contender: str, seed: int, num_robust: int, *, role: Role = "other", group: str = "home") -> Entry:
    clean, robust = np.arange(N) < 36, np.arange(N) < num_robust
    return Entry(
        group=group,
        contender=contender,
        role=role,
        activation={"sparta": "sparta", "frozen": "sparta", "control": "relu"}.get(contender, "silu"),
        seed=seed,
        architecture="resnet8 width=4",
        dataset="digits",
        num_parameters=1234,
        training_flops=2e15,
        epochs=3,
        precision="bf16",
        val_clean=0.9,
        val_robust=0.5,
        clean=Accuracy.of(36, N),
        robust=Accuracy.of(num_robust, N),
        attacks={"pgd-ce-20x1": num_robust / N},
        audit="passed",
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
        threat="linf",
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
    found = Study(name="s", threat="linf", entries=(entry("sparta", 0, 1), entry("sparta", 1, N - 1)))
    mean = found.mean("home", "sparta", "robust")
    assert (mean.low, mean.high) == (0.0, 1.0)


def test_differences_are_paired_by_seed() -> None:
    found = study().compare("home", "sparta", "control", "robust")
    gaps = np.array([4, 6, 5]) / N
    low, high = stats.t.interval(0.95, 2, gaps.mean(), gaps.std(ddof=1) / 3**0.5)
    assert (found.over_seeds.value, found.over_seeds.low, found.over_seeds.high) == pytest.approx((5 / N, low, high))
    assert found.clear


def test_a_seed_that_only_one_has_is_left_out() -> None:
    more = Study(name="x", threat="y", entries=(*study().entries, entry("sparta", 7, 40, role="main")))
    assert more.compare("home", "sparta", "control", "robust") == study().compare("home", "sparta", "control", "robust")
    with pytest.raises(ValueError, match="share a seed"):
        Study(name="x", threat="y", entries=(entry("a", 0, 1), entry("b", 1, 1))).compare("home", "a", "b", "robust")


def test_p_over_images_is_that_of_a_paired_t_test() -> None:
    one, other = study().of("home", "strong"), study().of("home", "control")
    gaps = np.mean([a.correct_robust.astype(float) - b.correct_robust for a, b in zip(one, other, strict=True)], axis=0)
    found = study().compare("home", "strong", "control", "robust")
    assert found.p_images == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue)
    assert study().compare("home", "strong", "control", "clean").p_images == 1.0


def test_the_main_contender_is_compared_with_the_control_and_the_strongest_other() -> None:
    found = [(c.a, c.b, c.what) for c in study().comparisons("home")]
    assert found == [("sparta", b, what) for b in ("control", "strong") for what in ("robust", "clean")]


def test_everything_is_in_study_json(tmp_path: Path) -> None:
    files = write_study(study(), tmp_path)
    assert all(path.stat().st_size > 0 for path in files)
    again = Study.load(tmp_path / "study.json")
    assert markdown(again) == (tmp_path / "results.md").read_text() == markdown(study())
    assert f"{N:,} test images; attacks: pgd-ce-20x1; trained in bf16." in markdown(again)
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


def test_a_network_of_both_parts_is_kept_as_it_was_though_it_was_trained_anew() -> None:
    again = changed(study(), weights_sha256="of another machine", evaluated="e" * 64)
    assert study().joined(again).model_dump_json() == study().model_dump_json()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trained": "f" * 64}, "expected home sparta 0 to be trained as aaaaaaaaaaaa, got ffffffffffff"),
        ({"evaluated": "f" * 64}, "expected home sparta 0 to be evaluated as bbbbbbbbbbbb, got ffffffffffff"),
        ({"attacks": {"weak": 0.5}}, "expected home to be judged on .*, got .* weak"),
        ({"precision": "fp32"}, "expected home to be judged on .*, got .* trained in fp32"),
        ({"dataset": "other"}, "expected home to be judged on digits, .*, got other"),
        ({"seed": 7}, "expected a network of home that both parts have, to compare them by, got none"),
    ],
)
def test_a_part_that_cannot_be_compared_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study().joined(changed(part("sparta"), **values))


def test_a_part_under_another_threat_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a study of 'linf', got 'l2'"):
        study().joined(study().model_copy(update={"threat": "l2"}))
