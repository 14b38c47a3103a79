import csv
import json
import re
from pathlib import Path

import pytest

from pipeline.config.report import ReportConfig
from pipeline.report import Report, ReportInputs, build_report
from pipeline.report.charts import pareto_front
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


def test_the_page_holds_all_it_needs_and_nothing_runs_in_it(report: Report):
    page = report.page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"""(?:src|href|srcset)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert page.count("data:image/png") == 6 * 2 * 3 * 5  # models, examples, tiles, image and four stages


def test_every_chart_is_also_a_png_and_every_table_a_csv(report: Report):
    names = {path.name for path in report.files}
    assert {f"{kind}-{i}.png" for kind in ("eps", "training") for i in range(3)} <= names
    assert {f"pictures-{i}.png" for i in range(6)} | {f"response-stage{i}.png" for i in range(4)} <= names
    assert {"overview.png", "sweep.png", "summary.csv", "curves.csv", "training.csv", "audit.csv", "sweep.csv"} <= names
    assert {"report.html", "report.json"} <= names
    assert all(path.stat().st_size > 0 for path in report.files)


def test_the_numbers_of_page_and_tables_are_those_of_the_records(report: Report, inputs: ReportInputs):
    page = report.page.read_text(encoding="utf-8")
    with (report.page.parent / "summary.csv").open(newline="", encoding="utf-8") as file:
        lines = {line["model"]: line for line in csv.DictReader(file)}
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


def test_the_audit_tells_failures_and_warnings(report: Report):
    page = report.page.read_text(encoding="utf-8")
    assert "source: passed, 1 warning (quick budget" in page
    assert "wider: failed gate_histogram, 1 warning (quick budget" in page


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
    points = [(0.9, 0.3), (0.8, 0.4), (0.8, 0.3), (0.9, 0.3), (0.1, 0.2)]
    assert sorted(pareto_front(points)) == [(0.8, 0.4), (0.9, 0.3)]


def test_labels_must_differ(inputs: ReportInputs):
    with pytest.raises(ValueError, match="different labels, got source twice"):
        ReportInputs(title="t", models=(inputs.models[0], inputs.models[0]))


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium at /usr/bin/chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_errors_requests_or_overflow(report: Report, width: int):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as api:
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
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.evaluate("document.images.length") == 180
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
