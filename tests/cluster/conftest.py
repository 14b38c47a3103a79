"""Ray's workers import the toys by name: they must find them, and speak up soon when something dies."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _workers_find_the_toys():
    patch = pytest.MonkeyPatch()
    paths = [str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    patch.setenv("PYTHONPATH", os.pathsep.join(paths))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def ray_session(request: pytest.FixtureRequest, _workers_find_the_toys):
    """One Ray for all tests of a file, by its SCALING."""
    from pipeline.cluster import ensure_ray

    with ensure_ray(request.module.SCALING):
        yield
