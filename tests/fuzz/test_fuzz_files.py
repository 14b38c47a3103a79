"""Files nobody wrote: every reader refuses them with its own error on one line, and writes nothing."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from pipeline.artifacts import sha256_of
from pipeline.config.data import DataConfig
from pipeline.data import DataError, FfcvMissingWarning, PreparedData, prepare
from pipeline.data.folder import folder_source
from pipeline.data.npz import npz_source
from pipeline.data.sidecar import read_sidecar
from pipeline.evaluation.blocks import load_arrays
from pipeline.training import ModelMeta, load_model, save_model
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.files import DamagedFilesError
from pipeline.training.progress import Progress
from sparta_models import ActivationBank
from sparta_models.files import _seal
from tests.data.data_sets import needs_ffcv, write_folder, write_npz
from tests.fuzz.bad_inputs import JUNK, all_refused, damaged, spoilt

META = ModelMeta(
    name="resnet8", options={"width": 4}, activation={"name": "sparta"}, num_classes=3, in_channels=1,
    mean=(0.5,), std=(0.5,), image_size=8, dataset="digits",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return META.build()


@pytest.fixture
def cached(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARTA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def prepared(tmp_path: Path, cached: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
    config = DataConfig(dataset="digits", loader="memory", limit={"train": 20, "val": 10, "test": 10})
    with pytest.warns(FfcvMissingWarning):
        return prepare(config, tmp_path / "prepared", seed=0).directory


def rewriting(path: Path, read: Callable[[], object]) -> Callable[[bytes | Any], None]:
    """Puts the input into `path`, as bytes or as JSON, and reads."""

    def use(content: bytes | Any) -> None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        read()

    return use


def records(path: Path) -> "st.SearchStrategy[bytes | Any]":
    """Damaged variants of a JSON file, as values and as bytes."""
    content = path.read_bytes()
    return damaged(json.loads(content)) | spoilt(content) | st.binary(max_size=30) | JUNK


# --- prepared data ---------------------------------------------------------------------------------------------------


def test_sidecars_are_refused(prepared: Path) -> None:
    split = prepared / "train.npz"
    sidecar = prepared / "train.npz.json"
    use = rewriting(sidecar, lambda: read_sidecar(split))
    all_refused(records(sidecar), use, DataError, count=200, unchanged=prepared)


def test_records_of_prepared_data_are_refused(prepared: Path) -> None:
    def read() -> None:
        data = PreparedData.load(prepared)
        for name in ("train", "val", "test"):
            data.check(name)

    use = rewriting(prepared / "prepared.json", read)
    all_refused(records(prepared / "prepared.json"), use, DataError, count=150, unchanged=prepared)


@needs_ffcv
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raw", "grey", "jpeg"])
def test_beton_files_with_sidecars_that_vouch_for_them_are_refused(kind: str, tmp_path: Path, cached: None) -> None:
    """Their indices lead out of the file, or out of an image: no signal ends the process, nothing but DataError."""
    source = tmp_path / "source.npz"
    if kind == "jpeg":
        source = write_folder(tmp_path / "source")
        config = DataConfig(dataset="folder", path=str(source), image_size=48, storage="jpeg", max_side=100)
    else:
        config = DataConfig(dataset="npz", path=str(write_npz(source)), channels=1 if kind == "grey" else 3)
    folder = prepare(config, tmp_path / "prepared", seed=0).directory
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.fuzz.beton_cases", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert int(done.stdout) >= 60


def npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def packed(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


ARRAYS = {
    "train_images": np.zeros((6, 4, 4, 3), np.uint8),
    "train_labels": np.arange(6) % 2,
    "test_images": np.zeros((4, 4, 4, 3), np.uint8),
    "test_labels": np.arange(4) % 2,
    "class_names": np.array(["a", "b"]),
}
PACKED = packed({**ARRAYS, "train_images": np.random.default_rng(0).integers(0, 255, (6, 4, 4, 3), np.uint8)})
TYPES = ["u1", "i8", "f4", "U3", "M8[s]", "c8", "?", "V4"]
WRONG = st.one_of(
    st.just(np.array([{}, None, 3], dtype=object)),
    st.just(np.array(3)),
    st.builds(np.zeros, st.lists(st.integers(0, 5), max_size=5).map(tuple), st.sampled_from(TYPES)),
    st.integers(-5, 2**60).map(lambda n: np.array([n, 0, 0, 1, 1, 1])),
)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """An .npz with one to three arrays replaced or left out, or its bytes damaged."""
    arrays = dict(ARRAYS)
    for name in draw(st.lists(st.sampled_from(sorted(ARRAYS)), min_size=1, max_size=3)):
        if draw(st.booleans()):
            arrays[name] = draw(WRONG)
        else:
            arrays.pop(name, None)
    return draw(st.just(npz(arrays)) | spoilt(npz(ARRAYS)) | spoilt(PACKED))


def test_npz_data_sets_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    config = DataConfig(dataset="npz", path=str(file))
    use = rewriting(file, lambda: npz_source(config))
    file.touch()
    all_refused(archives(), use, DataError, count=300, unchanged=tmp_path)


def test_damaged_blocks_of_an_evaluation_count_as_missing(tmp_path: Path) -> None:
    file = tmp_path / "block.npz"
    file.touch()

    def read() -> None:
        if load_arrays(file) is None:
            raise LookupError("missing")

    all_refused(spoilt(PACKED), rewriting(file, read), LookupError, count=100, unchanged=tmp_path)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/b", "..\\escaped", "x" * 300])
def test_an_npz_entry_cannot_leave_the_folder_it_is_unpacked_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "set.npz").write_bytes(npz(ARRAYS))
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.writestr(f"{name}.npy", b"x")
    with pytest.raises(DataError, match=r"entry called|cannot be read"):
        npz_source(DataConfig(dataset="npz", path=str(tmp_path / "set.npz")))
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    """Names of files and what is in them; images now and then, rubbish mostly."""
    names = st.text("abc._-é ", min_size=1, max_size=6).filter(lambda name: name.strip(". ") == name)
    paths = st.lists(names, min_size=1, max_size=3).map("/".join)
    suffix = st.sampled_from([".png", ".jpg", ".gif", ".txt", ".tiff", ""])
    return draw(st.dictionaries(st.builds("{}{}".format, paths, suffix), spoilt(PNG), max_size=4))


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png()


def test_folders_of_anything_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "images"

    def use(files: dict[str, bytes]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, content in files.items():
            try:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            except OSError:  # a file where a folder is needed
                continue
        folder_source(DataConfig(dataset="folder", path=str(root)))

    all_refused(folders(), use, DataError, count=150)


# --- networks, checkpoints, banks ------------------------------------------------------------------------------------


def test_networks_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model, META)
    record = tmp_path / "m" / "model.json"
    use = rewriting(record, lambda: load_model(tmp_path / "m"))
    all_refused(records(record), use, DamagedFilesError, count=150, unchanged=tmp_path)


def test_weights_with_a_fitting_digest_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    save_model(tmp_path / "m", model, META)
    weights, record = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "model.json"
    content, meta = weights.read_bytes(), json.loads(record.read_text())

    def use(data: bytes) -> None:
        weights.write_bytes(data)
        record.write_text(json.dumps({**meta, "sha256": {weights.name: sha256_of(weights)}}))
        load_model(tmp_path / "m")

    head = int.from_bytes(content[:8], "little") + 8  # a change behind it gives other weights, and valid ones
    inputs = spoilt(content[:head]).map(lambda data: data + content[head:]) | st.binary(max_size=50)
    all_refused(inputs, use, DamagedFilesError, count=100, unchanged=tmp_path)


def test_checkpoints_are_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    slot = Checkpoints(tmp_path, "job").save({"model": {"w": torch.ones(3)}, "optimizer": {}}, Progress(step=1))
    record = slot / "state.json"

    def read() -> None:
        caplog.clear()
        if Checkpoints(tmp_path, "job").load() is None:
            raise DamagedFilesError(caplog.messages[-1])

    all_refused(records(record), rewriting(record, read), DamagedFilesError, count=150, unchanged=tmp_path)


def test_banks_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    bank = ActivationBank.from_model(model).save(tmp_path / "bank")
    meta = bank / "bank.json"
    content = json.loads(meta.read_text())

    def use(value: Any) -> None:
        if isinstance(value, dict):  # somebody who knows how to seal
            value = {**value, "seal": _seal(value)} if _is_json(value) else value
        rewriting(meta, lambda: ActivationBank.load(bank))(value)

    all_refused(damaged(content) | spoilt(meta.read_bytes()), use, ValueError, count=250, unchanged=tmp_path)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except ValueError:
        return False
    return True


def test_tensors_of_banks_with_a_fitting_digest_are_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    bank = ActivationBank.from_model(model).save(tmp_path / "bank")
    tensors, meta = bank / "bank.safetensors", bank / "bank.json"
    content, record = tensors.read_bytes(), json.loads(meta.read_text())

    def use(data: bytes) -> None:
        tensors.write_bytes(data)
        sealed = {**record, "sha256": hashlib.sha256(data).hexdigest()}
        meta.write_text(json.dumps({**sealed, "seal": _seal(sealed)}))
        ActivationBank.load(bank)

    all_refused(spoilt(content) | st.binary(max_size=50), use, ValueError, count=150, unchanged=tmp_path)
