"""Which images go where: exact, stratified, by group, seeded."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.config.data import DataConfig, SplitLimits
from pipeline.data import DataError
from pipeline.data.sources import Source, SourceSplit, class_numbers
from pipeline.data.splits import select

SPLITS = ("train", "val", "test")


def source(labels, *, groups=None, test=None, classes=None):
    labels = np.asarray(labels)
    splits = {"train": SourceSplit(np.zeros((len(labels), 2, 2), np.uint8), labels, groups)}
    if test is not None:
        splits["test"] = SourceSplit(np.zeros((len(test), 2, 2), np.uint8), np.asarray(test))
    classes = classes or int(labels.max()) + 1
    return Source("made up", tuple(f"name{n}" for n in range(classes)), splits, size=2, channels=1)


@given(
    counts=st.lists(st.integers(4, 40), min_size=2, max_size=5),
    val_fraction=st.floats(0.05, 0.5),
    test_fraction=st.floats(0.05, 0.5),
    seed=st.integers(0, 5),
)
def test_held_out_splits_are_disjoint_complete_and_stratified(counts, val_fraction, test_fraction, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    config = DataConfig(val_fraction=val_fraction, test_fraction=test_fraction)
    chosen, _ = select(source(labels), config, seed)
    assert sorted(np.concatenate([chosen[s].indices for s in SPLITS])) == list(range(len(labels)))
    for split in SPLITS:
        assert (chosen[split].labels == labels[chosen[split].indices]).all()
        assert len(np.unique(chosen[split].labels)) == len(counts)
    held = np.bincount(chosen["test"].labels)
    assert (np.abs(held - test_fraction * np.array(counts)) <= 1).all()


@given(
    sizes=st.lists(st.integers(1, 6), min_size=8, max_size=40),
    classes=st.integers(2, 3),
    spanning=st.booleans(),
    own_test=st.booleans(),
    seed=st.integers(0, 5),
)
def test_groups_never_straddle(sizes, classes, spanning, own_test, seed):
    """Neither where the test split is held out too, nor where a group holds images of several classes."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = (np.arange(len(groups)) if spanning else groups) % classes
    made = source(labels, groups=groups, test=range(classes) if own_test else None, classes=classes)
    try:
        chosen, _ = select(made, DataConfig(val_fraction=0.3, test_fraction=0.3), seed)
    except DataError:  # what is left for training lacks a class
        assume(False)
    held = SPLITS[:2] if own_test else SPLITS
    parts = [set(groups[chosen[s].indices].tolist()) for s in held]
    assert all(parts)
    assert sorted(group for part in parts for group in part) == list(range(len(sizes)))
    assert sum(len(chosen[s].indices) for s in held) == len(labels)


def test_the_sources_own_test_split_is_kept_whole():
    chosen, _ = select(source([0, 1] * 10, test=[1, 0, 1]), DataConfig(), seed=0)
    assert chosen["test"].origin == "test"
    assert chosen["test"].labels.tolist() == [1, 0, 1]


def test_same_seed_same_split_other_seed_another():
    def val(seed):
        return select(source([0, 1] * 50), DataConfig(), seed)[0]["val"].indices.tolist()

    assert val(3) == val(3)
    assert val(3) != val(4)


def test_classes_are_relabelled_in_the_order_given():
    chosen, names = select(source([0, 1, 2, 3] * 10), DataConfig(classes=(3, "name1")), seed=0)
    assert names == ("name3", "name1")
    for split in SPLITS:
        original = chosen[split].indices % 4
        assert (np.where(original == 3, 0, 1) == chosen[split].labels).all()
        assert set(original) == {1, 3}


def test_limits_keep_the_class_proportions_and_at_least_one_of_each():
    labels = np.repeat([0, 1, 2], [300, 90, 10])
    limits = SplitLimits(train=40, val=12, test=9)
    chosen, _ = select(source(labels), DataConfig(limit=limits), seed=0)
    assert np.bincount(chosen["train"].labels).tolist() == [30, 9, 1]
    assert [len(chosen[s].indices) for s in SPLITS] == [40, 12, 9]
    assert all(len(np.unique(chosen[s].labels)) == 3 for s in SPLITS)
    assert (np.diff(chosen["train"].indices) > 0).all()


@pytest.mark.parametrize(
    ("made", "config", "message"),
    [
        (source([0, 0, 2, 2]), DataConfig(), "every class, got none of name1"),
        (
            source([0, 1] * 5),
            DataConfig(classes=(0, 7)),
            "class numbers from 0 to 1 or names, got 7; known: name0, name1",
        ),
        (source([0, 1] * 5), DataConfig(classes=("name0", "nmae1")), "got 'nmae1'"),
        (source([0, 1] * 5), DataConfig(classes=(0, "name0")), "names a class twice"),
        (source([0, 1, 2] * 5), DataConfig(limit=SplitLimits(train=2)), "data.limit.train=2 is below the number of"),
        (source([0, 1]), DataConfig(), "the val split would be empty"),
    ],
)
def test_a_split_that_cannot_be_made_is_refused(made, config, message):
    with pytest.raises(ValueError, match=message):
        select(made, config, seed=0)


def test_a_class_number_that_is_another_classes_name_is_refused():
    twelve = sorted(str(number) for number in range(12))  # as folders stand: 0, 1, 10, 11, 2 ...
    assert class_numbers([0, 1], twelve) == [0, 1]
    assert class_numbers(["2", "3"], twelve) == [4, 5]
    with pytest.raises(
        DataError, match=r"2 is the number of class '10', but reads as the name '2' too; give the names"
    ):
        class_numbers([2, 3], twelve)
    with pytest.raises(DataError, match=r"3 is the number of class '00004', .* the name '00003'"):
        class_numbers([0, 3], ["00000", "00001", "00003", "00004"])
    assert class_numbers([0, 1], ["00000", "00001", "00003", "00004"]) == [0, 1]
