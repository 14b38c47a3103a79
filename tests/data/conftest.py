"""Small data sets, prepared once per session: writing through FFCV starts a process that takes seconds."""

import pytest
from data_sets import HAS_FFCV, write_folder, write_npz

from pipeline.config.data import DataConfig
from pipeline.data import FfcvMissingWarning, PreparedData, prepare


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARTA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def rgb_config(tmp_path_factory) -> DataConfig:
    path = write_npz(tmp_path_factory.mktemp("source") / "random.npz")
    return DataConfig(dataset="npz", path=str(path), val_fraction=0.25)


@pytest.fixture(scope="session")
def rgb(rgb_config, tmp_path_factory) -> PreparedData:
    """RGB images in .beton files."""
    if not HAS_FFCV:
        pytest.skip("ffcv is not installed")
    return prepare(rgb_config, tmp_path_factory.mktemp("rgb"), seed=0)


@pytest.fixture(scope="session")
def rgb_npz(rgb_config, tmp_path_factory) -> PreparedData:
    """The same, in .npz files, as where FFCV is missing."""
    place = tmp_path_factory.mktemp("rgb_npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
        with pytest.warns(FfcvMissingWarning, match="read into memory"):
            return prepare(rgb_config, place, seed=0)


@pytest.fixture(scope="session")
def photos_config(tmp_path_factory) -> DataConfig:
    root = write_folder(tmp_path_factory.mktemp("photos"))
    return DataConfig(dataset="folder", path=str(root), image_size=48, storage="jpeg", max_side=100)


@pytest.fixture(scope="session")
def photos(photos_config, tmp_path_factory) -> PreparedData:
    """JPEG images of different shapes in .beton files."""
    if not HAS_FFCV:
        pytest.skip("ffcv is not installed")
    return prepare(photos_config, tmp_path_factory.mktemp("photos_prepared"), seed=0)
