import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.config.report import ReportConfig
from pipeline.evaluation.records import ClassResult
from pipeline.evaluation.stats import Accuracy
from pipeline.report import Report, ReportInputs, build_report
from pipeline.report.charts import pareto_front, percent
from pipeline.report.inputs import Learned
from sparta_models import ACTIVATIONS
from tests.report.conftest import load, make_card

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = "<script>alert('x')</script>\"&$_{b}^2"


@pytest.fixture(scope="module")
def report(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> Report:
    output = tmp_path_factory.mktemp("report") / "out"
    return build_report(inputs, output, ReportConfig(num_pictures=2, png_dpi=50), load=load)


def table(report: Report, name: str) -> list[dict[str, str]]:
    with (report.page.parent / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def require_chromium() -> None:
    """Where CI ran the set-up with apt at hand, Chromium is there: its absence is a defect, not a reason to skip."""
    if CHROMIUM.exists():
        return
    reason = f"no Chromium at {CHROMIUM}: nobody looks at the page in a browser; `make setup-dev` installs it by apt"
    if os.environ.get("CI") == "true" and shutil.which("apt-get"):
        pytest.fail(reason)
    pytest.skip(reason)


def test_the_page_holds_all_it_needs_and_nothing_runs_in_it(report: Report):
    page = report.page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"""(?:src|href|srcset)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert (
        page.count("data:image/png") == 6 * 2 * 3 * 5 + 1
    )  # models, examples, tiles, image and four stages; the sweep


def test_every_chart_is_also_a_png_and_every_table_a_csv(report: Report):
    names = {path.name for path in report.files}
    assert {f"{kind}-{i}.png" for kind in ("eps", "training") for i in range(3)} <= names
    assert {f"pictures-{i}.png" for i in range(6)} | {f"response-stage{i}.png" for i in range(4)} <= names
    tables = ("summary", "transfer", "two_by_two", "per_class", "curves", "training", "audit", "sweep")
    assert {f"{name}.csv" for name in tables} <= names
    assert {"overview.png", "sweep.png", "search_coordinates.png", "report.html", "report.json"} <= names
    assert all(path.stat().st_size > 0 for path in report.files)


def test_the_numbers_of_page_and_tables_are_those_of_the_records(report: Report, inputs: ReportInputs):
    page = report.page.read_text(encoding="utf-8")
    lines = {line["model"]: line for line in table(report, "summary")}
    for card in inputs.models:
        union = card.evaluation.union
        assert float(lines[card.label]["robust"]) == union.correct / union.n
        assert float(lines[card.label]["robust_low"]) == union.low
        assert f"{100 * union.value:.1f} %" in page
    source, control = (card.evaluation.union.value for card in inputs.models[:2])
    assert float(lines["source"]["robust_gain"]) == pytest.approx(source - control)
    assert f"{100 * (source - control):+.1f}" in page
    stored = json.loads((report.page.parent / "report.json").read_text(encoding="utf-8"))
    assert ReportInputs.model_validate(stored["inputs"]) == inputs


def test_the_transfer_matrix_is_a_table_of_its_own(report: Report, inputs: ReportInputs):
    lines = {line["target"]: line for line in table(report, "transfer")}
    assert list(lines) == ["source", "wider", "digits59"]
    assert [line["frozen"] for line in lines.values()] == ["False", "True", "True"]
    frozen, control = (card.evaluation.union for card in inputs.models[4:])
    line = lines["digits59"]
    assert (line["learned_on"], line["dataset"], line["control"]) == ("digits04", "digits59", "relu")
    assert (float(line["robust"]), float(line["control_robust_high"])) == (frozen.value, control.high)
    assert float(line["robust_gain"]) == pytest.approx(frozen.value - control.value)


def test_an_activation_that_was_trained_elsewhere_is_told_by_where_that_was(inputs: ReportInputs, tmp_path: Path):
    cards = tuple(card for card in inputs.models if card.target != "source")
    learned = Learned(dataset="cifar10", architecture="resnet18", activation="sparta")
    elsewhere = ReportInputs(title="t", models=cards, learned=learned)
    report = build_report(elsewhere, tmp_path, ReportConfig(num_pictures=0))
    lines = table(report, "transfer")
    assert {(line["learned_on"], line["learned_in"], line["frozen"]) for line in lines} == {
        ("cifar10", "resnet18", "True")
    }
    page = report.page.read_text(encoding="utf-8")
    assert re.search(r'<th scope="row">cifar10<span class="interval">sparta in resnet18</span>', page)
    assert "trained with it" not in page


def test_the_two_by_two_is_a_table_of_its_own(report: Report, inputs: ReportInputs):
    lines = {line["activation"]: line for line in table(report, "two_by_two")}
    assert set(lines) == set(ACTIVATIONS)
    assert (lines["sparta"]["spatially"], lines["sparta"]["input"]) == ("varying", "dependent")
    assert float(lines["sparta"]["robust"]) == inputs.models[0].evaluation.union.value
    assert lines["silu"]["robust"] == lines["silu"]["n"] == ""  # not measured


def test_classes_are_on_the_page_and_in_a_table(inputs: ReportInputs, tmp_path: Path):
    card = inputs.models[0]
    classes = [
        ClassResult(name="zero", clean=Accuracy.of(9, 10), robust=Accuracy.of(3, 10)),
        ClassResult(name="one", clean=Accuracy.of(8, 8), robust=Accuracy.of(7, 8)),
    ]
    other = inputs.models[1].evaluation.model_copy(update={"per_class": tuple(classes[1:])})
    cards = (
        card.model_copy(update={"evaluation": card.evaluation.model_copy(update={"per_class": tuple(classes)})}),
        inputs.models[1].model_copy(update={"evaluation": other}),
    )
    report = build_report(ReportInputs(title="t", models=cards), tmp_path, ReportConfig(num_pictures=0))
    lines = table(report, "per_class")
    assert [(line["model"], line["class"], line["n"]) for line in lines] == [
        ("source", "zero", "10"),
        ("source", "one", "8"),
        ("source-control", "one", "8"),
    ]
    assert [float(line["robust"]) for line in lines] == [0.3, 0.875, 0.875]
    page = report.page.read_text(encoding="utf-8")
    assert "source: clean and robust accuracy of 2 classes" in page
    assert "(n = 10)" in page
    assert re.search(r'<th scope="row">zero</th><td[^>]*>\s*90.0 %', page)
    none = card.model_copy(update={"evaluation": card.evaluation.model_copy(update={"per_class": ()})})
    again = build_report(ReportInputs(title="t", models=(none,)), tmp_path, ReportConfig(num_pictures=0))
    assert "By class" not in again.page.read_text(encoding="utf-8")
    assert not (tmp_path / "per_class.csv").exists()


def test_training_and_search_say_how_many_images_validated_them(report: Report, inputs: ReportInputs, tmp_path: Path):
    page = report.page.read_text(encoding="utf-8")
    assert page.count("n = 179 validation images") == 3 + 1  # three targets, the search
    assert {line["n"] for name in ("training", "sweep") for line in table(report, name)} == {"179"}
    unknown = inputs.models[0].model_copy(update={"num_validation": None})
    other = build_report(ReportInputs(title="t", models=(unknown,)), tmp_path, ReportConfig(num_pictures=0))
    assert "validation images" not in other.page.read_text(encoding="utf-8")


def test_the_audit_tells_failures_and_warnings(report: Report):
    page = report.page.read_text(encoding="utf-8")
    assert "source: passed, 1 warning (quick budget" in page
    assert "wider: failed gate_saturation, 1 warning (quick budget" in page


def test_names_are_text_everywhere(tmp_path: Path):
    card = make_card(
        tmp_path,
        "nasty",
        role="source",
        target=NASTY,
        robust=0.5,
        dataset=NASTY,
        class_names=(NASTY, "b", "c", "d", "e"),
    )
    inputs = ReportInputs(title=NASTY, models=(card,), lineage=NASTY, reference=NASTY, facts={NASTY: NASTY})
    page = build_report(inputs, tmp_path / "out", load=load).page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6


def test_a_name_that_a_spreadsheet_would_run_is_quoted(tmp_path: Path):
    card = make_card(tmp_path, "=1+1", role="source", target="t", robust=0.5)
    build_report(ReportInputs(title="t", models=(card,)), tmp_path / "out", load=load)
    assert "\n'=1+1," in (tmp_path / "out" / "summary.csv").read_text(encoding="utf-8")


def test_a_report_again_leaves_nothing_of_the_one_before_and_nothing_else_is_touched(
    inputs: ReportInputs, tmp_path: Path
):
    card = inputs.models[0].model_copy(update={"model_directory": None})
    first = ReportInputs(title="t", models=(card,), trials=inputs.trials)
    assert {"sweep.png", "sweep.csv", "pictures-0.png"} <= {p.name for p in build_report(first, tmp_path).files}
    (tmp_path / "mine.png").write_bytes(b"")
    again = build_report(ReportInputs(title="t", models=(card,)), tmp_path, ReportConfig(num_pictures=0))
    names = {path.name for path in again.files}
    assert not {"sweep.png", "sweep.csv", "pictures-0.png"} & names
    assert {path.name for path in tmp_path.iterdir()} == {*names, "mine.png"}


def test_without_networks_the_images_are_still_shown(inputs: ReportInputs, tmp_path: Path):
    card = inputs.models[0].model_copy(update={"model_directory": None})
    report = build_report(ReportInputs(title="t", models=(card,)), tmp_path, ReportConfig(num_pictures=2))
    assert report.page.read_text(encoding="utf-8").count("data:image/png") == 2 * 3


def test_altered_arrays_are_refused_and_an_older_report_stays(tmp_path: Path):
    card = make_card(tmp_path, "a", role="source", target="t", robust=0.5)
    inputs, out = ReportInputs(title="t", models=(card,)), tmp_path / "out"
    before = {path: path.read_bytes() for path in build_report(inputs, out, load=load).files}
    (card.evaluation_directory / "evaluation.npz").write_bytes(b"no longer what was judged")
    with pytest.raises(ValueError, match="missing or altered"):
        build_report(inputs, out, load=load)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_what_a_sweep_drew_is_on_the_page_and_beside_it(inputs: ReportInputs, tmp_path: Path):
    drawn = build_report(inputs, tmp_path / "any", ReportConfig(num_pictures=0)).page.parent / "overview.png"
    picture = drawn.rename(tmp_path / "search_coordinates.png")
    card = inputs.models[0].model_copy(update={"model_directory": None})
    swept = ReportInputs(title="t", models=(card,), trials=inputs.trials, sweep_pictures=(picture,))
    report = build_report(swept, tmp_path / "out", ReportConfig(num_pictures=0))
    assert report.page.read_text(encoding="utf-8").count("data:image/png") == 1
    assert (tmp_path / "out" / "search_coordinates.png").read_bytes() == picture.read_bytes()


def test_the_front_is_what_no_trial_beats():
    points = [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.4, 0.4), (0.5, 0.4), (0.1, 0.9)]
    assert sorted(pareto_front(points)) == [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1)]


def test_ticks_have_the_decimals_that_they_need() -> None:
    assert [percent(tick) for tick in (0, 0.025, 3 * 0.025, 0.1, 1)] == ["0%", "2.5%", "7.5%", "10%", "100%"]


def test_labels_must_differ(inputs: ReportInputs):
    with pytest.raises(ValueError, match="different labels, got source twice"):
        ReportInputs(title="t", models=(inputs.models[0], inputs.models[0]))


@pytest.mark.parametrize(("ci", "outcome"), [("true", "failed"), ("", "skipped")])
def test_without_chromium_the_browser_tests_say_so_and_fail_in_ci(ci: str, outcome: str, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(sys.modules[__name__], "CHROMIUM", tmp_path / "chromium")
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/apt-get")
    kind = pytest.fail.Exception if outcome == "failed" else pytest.skip.Exception
    with pytest.raises(kind, match=r"no Chromium at .*make setup-dev"):
        require_chromium()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_errors_requests_or_overflow(report: Report, width: int):
    require_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        messages: list[str] = []
        requests: list[str] = []
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(report.page.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.evaluate("document.images.length") == 181
            checks = page.evaluate(
                "[...document.querySelectorAll('th')].map(th => th.textContent).filter(t => /^\\d+\\. /.test(t))"
            )
            assert len(checks) == 17
            shown = page.evaluate(
                "[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().height)"
            )
            assert len(shown) == 12
            assert min(shown) > 100
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(15, 18, 22)") is (scheme == "dark")
        browser.close()
    assert messages == []
    assert {url for url in requests if not url.startswith("data:")} == {report.page.as_uri()}
