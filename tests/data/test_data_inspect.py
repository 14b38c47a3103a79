"""The command that looks into a split file."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.data.__main__ import main
from pipeline.data.sidecar import sidecar_path


@pytest.mark.parametrize("kind", ["rgb", "rgb_npz", "photos"])
def test_inspect_describes_the_file_and_draws_it(request, kind, tmp_path, capsys):
    prepared = request.getfixturevalue(kind)
    assert main(["inspect", str(prepared.path("train")), "--grid", str(tmp_path / "grid.png")]) == 0
    shown = capsys.readouterr().out
    assert f"count         {prepared.splits['train'].count}" in shown
    assert prepared.splits["train"].sha256 in shown
    assert f"mean          {prepared.mean[0]:.4f}" in shown
    assert all(name in shown for name in prepared.class_names)
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) >= prepared.image_size
        assert np.asarray(grid).std() > 20


def test_inspect_reports_damage_in_one_line(rgb_npz, tmp_path, capsys):
    shutil.copy(rgb_npz.path("train"), tmp_path)
    shutil.copy(rgb_npz.directory / "prepared.json", tmp_path)
    assert main(["inspect", str(tmp_path / "train.npz")]) == 2
    message = capsys.readouterr().err
    assert "its sidecar train.npz.json is missing" in message
    assert message.count("\n") == 1


def test_nobody_is_told_to_delete_a_folder_of_her_own(rgb_npz, tmp_path, capsys):
    shutil.copy(rgb_npz.path("train"), tmp_path / "mine.npz")
    for name, message in (
        ("mine.npz", "expected a file that the prepare stage wrote"),
        ("nosuch.beton", "got no file"),
    ):
        assert main(["inspect", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "delete the folder" not in said


@pytest.mark.parametrize("grid", ["missing/grid.png", "grid.nosuch"])
def test_a_grid_that_cannot_be_written_is_one_line(rgb_npz, tmp_path, capsys, grid):
    assert main(["inspect", str(rgb_npz.path("train")), "--grid", str(tmp_path / grid)]) == 2
    message = capsys.readouterr().err
    assert f"--grid={tmp_path / grid}: cannot be written" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("record", ["{", '{"classes": ["a"]}', None])
def test_a_record_that_is_not_the_files_names_no_classes(rgb_npz, tmp_path, capsys, record):
    """None: a record of other data, with as many splits and fewer classes."""
    for source in (rgb_npz.path("train"), sidecar_path(rgb_npz.path("train"))):
        shutil.copy(source, tmp_path)
    other = rgb_npz.model_dump(mode="json") | {"class_names": ["cat", "dog"], "num_classes": 2}
    for split in other["splits"].values():
        split["sha256"] = "0" * 64
    (tmp_path / "prepared.json").write_text(json.dumps(other) if record is None else record)
    assert main(["inspect", str(tmp_path / "train.npz"), "--grid", str(tmp_path / "grid.png")]) == 0
    shown = capsys.readouterr().out
    assert "cat" not in shown
    assert f"  {'2':<3}{rgb_npz.splits['train'].class_counts[2]:>8,}" in shown
