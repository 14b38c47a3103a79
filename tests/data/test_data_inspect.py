"""The command that looks into a split file."""

import shutil

import numpy as np
import pytest
from PIL import Image

from pipeline.data.__main__ import main


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
    assert main(["inspect", str(tmp_path / "train.npz")]) == 2
    message = capsys.readouterr().err
    assert "its sidecar train.npz.json is missing" in message
    assert message.count("\n") == 1
