"""Samples chosen by their position: only these are read, in the order asked for."""

import numpy as np
import pytest
import torch

from pipeline.data import open_split

CHOSEN = np.array([5, 0, 3])


@pytest.mark.parametrize("data", ["rgb", "rgb_npz", "photos"])
def test_chosen_samples_are_those_of_the_split_in_the_order_asked_for(data, request):
    prepared = request.getfixturevalue(data)
    with open_split(prepared, "train", batch_size=100) as every:
        ((x, y),) = every
    with open_split(prepared, "train", batch_size=2, positions=CHOSEN) as loader:
        batches = list(loader)
    assert [len(labels) for _, labels in batches] == [2, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), x[CHOSEN])
    assert torch.equal(torch.cat([labels for _, labels in batches]), y[CHOSEN])
