"""Batches as a function of (seed, epoch, rank, world size)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import Order


@given(
    num_samples=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 7),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_and_equally_many_batches_on_every_rank(num_samples, batch_size, world_size, shuffle, epoch):
    if num_samples < world_size:
        return
    ranks = [Order(num_samples, batch_size, 5, shuffle, rank, world_size) for rank in range(world_size)]
    batches = [order.batches(epoch) for order in ranks]
    assert sorted(np.concatenate([i for rank in batches for i in rank])) == list(range(num_samples))
    assert {len(rank) for rank in batches} == {len(order) for order in ranks}
    assert all(1 <= len(batch) <= max(2, batch_size) for rank in batches for batch in rank)


@given(
    num_samples=st.integers(1, 120),
    batch_size=st.integers(2, 40),
    before=st.integers(1, 6),
    after=st.integers(1, 6),
)
def test_another_number_of_ranks_takes_up_an_epoch_and_sees_every_other_sample_once(
    num_samples, batch_size, before, after
):
    """Of a joint batch, which need not divide; wherever the epoch may be left."""
    most = max(before, after)
    if num_samples < most or batch_size < 2 * most:
        return

    def batches(world_size):
        ranks = [Order(num_samples, batch_size, 5, True, rank, world_size, joint=True) for rank in range(world_size)]
        return ranks[0], [np.concatenate(shares) for shares in zip(*(r.batches(1) for r in ranks), strict=True)]

    (order, first), (other, second) = batches(before), batches(after)
    assert len(first) == len(second)
    places = [place for place in range(len(first) + 1) if order.may_pause(place)]
    assert places == [place for place in range(len(first) + 1) if other.may_pause(place)]
    assert len(places) >= len(first)
    for place in places:
        assert sorted(np.concatenate([*first[:place], *second[place:]])) == list(range(num_samples))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_ranks_share_a_joint_batch_to_one_sample_evenly(world_size):
    ranks = [Order(100, 20, 0, True, rank, world_size, joint=True).batches(0) for rank in range(world_size)]
    for shares in zip(*ranks, strict=True):
        sizes = [len(share) for share in shares]
        assert sum(sizes) == 20
        assert max(sizes) - min(sizes) <= 1


@given(num_samples=st.integers(8, 300), world_size=st.integers(1, 5), more=st.integers(0, 30))
def test_no_rank_trains_on_a_single_sample(num_samples, world_size, more):
    batch_size = 4 * world_size + more
    if num_samples < batch_size:
        return
    for rank in range(world_size):
        batches = Order(num_samples, batch_size, 0, True, rank, world_size, joint=True).batches(0)
        assert min(len(batch) for batch in batches) >= 2


def test_one_process_gets_the_usual_batches():
    assert [b.tolist() for b in Order(7, 3).batches(0)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_sees_the_same_samples_whatever_the_number_of_ranks(world_size):
    alone = Order(54, 8, 3, shuffle=True).batches(2)
    ranks = [Order(54, 8 // world_size, 3, True, rank, world_size).batches(2) for rank in range(world_size)]
    for step, batch in enumerate(alone[:-1]):
        assert sorted(batch) == sorted(np.concatenate([rank[step] for rank in ranks]))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return np.concatenate(Order(100, 10, seed, shuffle=True).batches(epoch)).tolist()

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)


def test_generators_differ_between_ranks_epochs_and_batches():
    def draw(rank, epoch, batch):
        order = Order(100, 10, 0, True, rank, 2)
        return torch.rand(1, generator=order.generator(epoch, batch)).item()

    places = [(r, e, b) for r in range(2) for e in range(3) for b in range(3)]
    assert len({draw(*place) for place in places}) == len(places)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 5, "batch_size": 0}, "batch_size expected at least 1, got 0"),
        ({"num_samples": 5, "batch_size": 2, "rank": 2, "world_size": 2}, "rank expected from 0 to"),
        ({"num_samples": 1, "batch_size": 2, "world_size": 2}, "use fewer ranks"),
        ({"num_samples": 9, "batch_size": 5, "world_size": 3, "joint": True}, "at least 2 samples for each of 3 ranks"),
    ],
)
def test_an_order_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Order(**arguments)
