"""The committed study is where every figure of README, docs/results.md and the shipped banks comes from."""

import os
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from pipeline.artifacts import StageRecord, damaged_outputs, digest_outputs, load_record, save_record
from pipeline.config.load import load_config
from pipeline.data import open_split, prepare
from pipeline.data.sample import sample
from pipeline.report.study import Mean
from pipeline.report.study_page import interval, markdown
from pipeline.training.model_io import load_model, model_sha256
from sparta_models import ActivationBank, build_model, pretrained_banks
from sparta_models.bank import PRETRAINED
from tests.infra.conftest import ROOT, script

IMAGES = Path(os.environ.get("SPARTA_DATA", "no data"))


@pytest.fixture(scope="module")
def results() -> ModuleType:
    return script("results")


def test_quoted_figures_are_those_of_the_study(results: ModuleType) -> None:
    for path, blocks in results.quotations(results.study()).items():
        text = (ROOT / path).read_text(encoding="utf-8")
        for mark, block in blocks.items():
            assert results.updated(text, mark, block) == text, "run: python infra/results.py"


def test_marks_that_are_missing_are_named(results: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected the marks <!-- all --> and <!-- /all -->, got none"):
        results.updated("<!-- all -->\n", "all", "text")


def test_an_altered_figure_is_noticed(results: ModuleType) -> None:
    found = results.study()
    entry = found.entries[0]
    clean = entry.clean.model_copy(update={"value": entry.clean.value + 0.2})
    altered = found.model_copy(update={"entries": (entry.model_copy(update={"clean": clean}), *found.entries[1:])})
    then, now = results.quotations(altered), results.quotations(found)
    assert all(then[path][mark] != now[path][mark] for path in now for mark in now[path])


def test_the_prose_around_the_results_quotes_no_figure_of_its_own(results: ModuleType) -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    prose = results.updated(results.updated(text, results.OVERVIEW, ""), results.ALL, "")
    assert re.findall(r"\d+\.\d+ (?:points|%)", prose) == []


def test_the_studys_own_tables_are_made_of_its_record(results: ModuleType) -> None:
    assert (ROOT / "results" / "results.md").read_text(encoding="utf-8") == markdown(results.study())


def write_search(folder: Path, seed: int, gain: float) -> Path:
    """A finished search over radius and steps; the second trial of seed 1 failed."""
    kept = folder / "search" / "best" / "abc"
    kept.mkdir(parents=True)
    (kept.parent / "current.txt").write_text("abc\n")
    second = "failed,0,,,,0" if seed else f"done,2,0.4,{0.375 + gain},2,1"
    rows = [
        "trial,state,epochs,clean,robust,best_epoch,front,seconds,eps,steps,error",
        f"1,done,2,0.5,{0.25 + gain},2,0,9.0,{4 / 255},10,",
        f"2,{second},9.0,{8 / 255},10,",
        f"3,done,2,0.3,{0.35 + gain},2,1,9.0,{8 / 255},20,",
    ]
    (kept / "trials.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    record = StageRecord(
        stage="search", branch="best", fingerprint=str(seed) * 64, payload={}, output_digest="b" * 64,
        inputs={"sections": {"seed": seed, "search": {"epochs": 2}}}, outputs=digest_outputs(kept, ["trials.csv"]),
    )  # fmt: skip
    save_record(kept, record)
    return folder


def test_a_sweep_is_shown_with_its_means_over_seeds(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "SWEEP", tmp_path / "sweep")
    results.take_sweeps(
        [write_search(tmp_path / name, seed, gain) for name, seed, gain in (("a", 0, 0.0), ("b", 1, 0.01))]
    )
    text = "\n".join(results.sweep(tmp_path / "sweep"))
    assert "3 trials of 2 epochs over eps, steps, 2 seeds" in text
    assert f"Searches `{'0' * 12}`, `{'1' * 12}`" in text
    weak, strong = (Mean.of([0.5, 0.5]), Mean.of([0.25, 0.26])), (Mean.of([0.35, 0.3]), Mean.of([0.3625, 0.36]))
    assert f"| eps | 4/255 | {interval(weak[0])} | {interval(weak[1])} |" in text
    assert f"| eps | 8/255 | {interval(strong[0])} | {interval(strong[1])} |" in text
    step = [interval(Mean.of(gaps), signed=True) for gaps in ([-0.15, -0.2], [0.1125, 0.1])]
    assert f"| eps | 8/255 – 4/255 | {step[0]} | {step[1]} |" in text
    assert "| 8/255 | 10 | 40.0 | 37.5 |" in text  # of the one seed that has it
    assert f"| 4/255 | 10 | {interval(Mean.of([0.5, 0.5]))} | {interval(Mean.of([0.25, 0.26]))} |" in text
    assert results.sweep(tmp_path / "none") == []
    (tmp_path / "a/search/best/abc/trials.csv").unlink()
    with pytest.raises(SystemExit, match="expected a finished search"):
        results.take_sweeps([tmp_path / "a"])


def test_the_committed_sweep_is_as_it_was_written(results: ModuleType) -> None:
    assert list(results.SWEEP.iterdir())
    for folder in results.SWEEP.iterdir():
        record = load_record(folder)
        assert record is not None
        assert not list(damaged_outputs(folder, record))


def test_accuracies_are_those_of_the_images(results: ModuleType) -> None:
    for entry in results.study().entries:
        for what in ("clean", "robust"):
            assert entry.correct(what).sum() == entry.accuracy(what).correct
            assert entry.accuracy(what).value == entry.accuracy(what).correct / entry.accuracy(what).n
        assert not (entry.correct_robust & ~entry.correct_clean).any()


@pytest.mark.parametrize("name", pretrained_banks())
def test_a_shipped_bank_is_the_studys_and_can_be_applied(name: str, results: ModuleType) -> None:
    bank, entries = ActivationBank.pretrained(name), results.shipped(name)
    assert entries
    assert {e.weights_sha256 for e in entries} == {bank.source["weights_sha256"]}
    written = (PRETRAINED / name / results.CARD).read_text(encoding="utf-8")
    assert written == results.card(name, entries)
    network = bank.apply_to(build_model("resnet14", width=16, activation="relu"))
    assert network(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert not any(p.requires_grad for site in network.modules() if hasattr(site, "gate") for p in site.parameters())


def test_the_finalists_networks_can_be_attacked_by_anyone(results: ModuleType) -> None:
    final = results.finalists(results.study())
    assert {path.name for path in results.NETWORKS.iterdir()} == final.keys()
    for name, entry in final.items():
        assert model_sha256(results.NETWORKS / name) == entry.weights_sha256
        assert load_model(results.NETWORKS / name)(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.mark.skipif(not (IMAGES / "cifar10.npz").is_file(), reason="SPARTA_DATA holds no cifar10.npz")
def test_the_finalists_networks_are_right_on_the_images_that_the_study_says(
    results: ModuleType, tmp_path: Path
) -> None:
    config = load_config("study").data
    few = config.limit.model_copy(update={"train": 100, "val": 100})
    data = prepare(config.model_copy(update={"limit": few}), tmp_path, seed=0)
    for name, entry in results.finalists(results.study()).items():
        network, judged = load_model(results.NETWORKS / name), sample(entry.split_size, entry.clean.n)
        with open_split(data, "test", batch_size=256, positions=judged) as loader, torch.no_grad():
            right = torch.cat([network(x).argmax(1) == y for x, y in loader]).numpy()
        assert data.splits["test"].count == entry.split_size
        assert (right != entry.correct_clean).sum() <= 1, "another processor may round one image to the other side"


def test_a_bank_ships() -> None:
    assert pretrained_banks()


def test_an_unknown_bank_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=f"expected a name among {pretrained_banks()[0]}.*, got 'none'"):
        ActivationBank.pretrained("none")


def test_the_studys_images_are_the_first_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("cifar10_npz")
    monkeypatch.setattr(module, "PER_CLASS", 2)
    monkeypatch.setattr(module, "NUM_TEST", 1)
    labels = np.array([1, 0, 1, 1, 0, 0], np.uint8)
    images = np.arange(6, dtype=np.uint8)[:, None]
    found = module.chosen((images, labels), (images, labels))
    assert found["train_labels"].tolist() == [1, 0, 1, 0]
    assert found["train_images"].ravel().tolist() == [0, 1, 2, 4]
    assert found["test_images"].ravel().tolist() == [0]
    assert module.differing(found) == list(module.DIGESTS)


@pytest.mark.skipif(not (IMAGES / "cifar10.npz").is_file(), reason="SPARTA_DATA holds no cifar10.npz")
def test_the_study_was_made_with_images_that_can_be_made_again() -> None:
    module = script("cifar10_npz")
    arrays = np.load(IMAGES / "cifar10.npz")
    assert module.differing(dict(arrays)) == []
    again = module.chosen(*((arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in ("train", "test")))
    assert module.differing(again) == []
