from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from scldm_cd4._errors import DataError
from scldm_cd4.train.loaders import CountBatches, LatentBatches, make_loader, split_counts
from scldm_cd4.train.order import Draw, EpochSampler


@given(n=st.integers(1, 60), size=st.integers(1, 70), epoch=st.integers(0, 5), seed=st.integers(0, 9))
def test_an_epoch_has_every_cell_once_in_batches_of_nearly_equal_size(n, size, epoch, seed):
    sampler = EpochSampler(n, size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(np.concatenate([b.positions for b in batches])) == list(range(n))
    sizes = [len(b) for b in batches]
    assert len(batches) == len(sampler)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochSampler(40, 7, seed)
        sampler.set_epoch(epoch)
        return np.concatenate([b.positions for b in sampler]).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert order(None, 3) == list(range(40))


@given(n=st.integers(6, 90), size=st.integers(1, 20), world=st.integers(1, 6), block=st.sampled_from([1, 4, 7]))
def test_processes_share_the_batches_of_one_process(n, size, world, block):
    def batches(size, rank, world):
        sampler = EpochSampler(n, size, 3, rank=rank, world=world, block=block, group=2)
        sampler.set_epoch(1)
        out = list(sampler) if block == 1 else [draw for group in sampler for draw in group]
        assert len(out) == len(sampler)
        return out

    own = [batches(size, rank, world) for rank in range(world)]
    assert len({len(b) for b in own}) == 1
    assert all(0 < len(draw) <= max(size, 2) for rank in own for draw in rank)
    joined = [np.concatenate([draw.positions for draw in step]) for step in zip(*own, strict=True)]
    assert sorted(np.concatenate(joined)) == list(range(n))  # every cell once in an epoch
    assert all(draw.n_total == len(whole) for rank in own for draw, whole in zip(rank, joined, strict=True))
    if len(joined) == -(-n // (size * world)):
        one = batches(size * world, 0, 1)
        assert [b.tolist() for b in joined] == [draw.positions.tolist() for draw in one]


def test_fewer_cells_than_processes_are_refused():
    with pytest.raises(DataError, match="2 cells are too few for 3 processes"):
        EpochSampler(2, 8, 0, world=3)


def test_blocks_keep_neighbours_near_and_mix_all_else():
    sampler = EpochSampler(1000, 20, 0, block=10, group=5)
    groups = [np.concatenate([draw.positions for draw in group]) for group in sampler]
    assert [len(g) for g in groups] == [100] * 10
    for positions in groups:
        assert len(np.unique(positions // 10)) == 10  # whole blocks
        assert np.ptp(positions) > 500  # from everywhere
    first = next(iter(sampler))[0].positions
    assert len(np.unique(first // 10)) > 7  # a batch has cells of most blocks of its group


def test_weights_say_how_often_an_item_occurs():
    weights = np.repeat([1.0, 4.0], [30, 10])
    sampler = EpochSampler(40, 7, seed=0, weights=weights)
    drawn = np.zeros(40)
    for epoch in range(50):
        sampler.set_epoch(epoch)
        order = np.concatenate([b.positions for b in sampler])
        assert len(order) == 40
        times = np.bincount(order, minlength=40)
        assert (np.abs(times - weights * 40 / 70) < 1).all()  # rounded up or down
        drawn += times
    np.testing.assert_allclose(drawn / 50, weights * 40 / 70, atol=0.2)


def test_balance_draws_perturbations_of_few_cells_more_often():
    labels = torch.zeros(100, 3, dtype=torch.int64)
    labels[64:, 2] = 1
    counts = {}
    for balance in (0.0, 0.5, 1.0):
        data = LatentBatches(torch.zeros(100, 1, 2), labels, balance=balance)
        drawn = torch.cat([batch["labels"][:, 2] for batch in make_loader(data, 10, seed=1)])
        counts[balance] = torch.bincount(drawn).tolist()
    assert counts[0.0] == [64, 36]
    assert counts[0.5] == pytest.approx([100 * 8 / 14, 100 * 6 / 14], abs=1)
    assert counts[1.0] == pytest.approx([50, 50], abs=1)


def test_a_loader_goes_on_in_the_middle():
    data = LatentBatches(torch.arange(40.0).view(20, 1, 2), torch.zeros(20, 3, dtype=torch.int64))
    whole = [b["latent"] for b in make_loader(data, 6, seed=3)]
    loader = make_loader(data, 6, seed=3)
    loader.load_state_dict({"epoch": 0, "done": 2})
    rest = [b["latent"] for b in loader]
    assert len(rest) == len(whole) - 2
    assert all(map(torch.equal, rest, whole[2:]))
    assert len(list(loader)) == len(whole)


def test_worker_processes_started_by_spawn_give_the_same_batches(cells_of):
    data = CountBatches(cells_of(12), np.arange(2, 12), expressed=True)
    own, spawned = ([dict(b) for b in make_loader(data, 5, 0, num_workers=w)] for w in (0, 1))
    assert len(own) == len(spawned) == 2
    for a, b in zip(own, spawned, strict=True):
        assert (
            a.keys()
            == b.keys()
            == {
                "target",
                "genes",
                "counts",
            }
        )
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("expressed", [True, False])
def test_split_counts_show_one_part_and_ask_for_the_other(cells_of, expressed):
    cells = cells_of(40)
    data = CountBatches(cells, np.arange(40), expressed=expressed, shown=(0.6, 0.8), seed=1)
    batch, whole = data[np.arange(40)], torch.from_numpy(cells.counts(np.arange(40)).toarray())
    seen = batch["counts"]
    if expressed:
        assert ((batch["genes"] > 0) == (seen > 0)).all()  # what was not drawn is not even named
        dense = torch.zeros(40, cells.n_genes + 1).scatter_add_(1, batch["genes"], seen)
        seen = dense[:, 1:]
    assert torch.equal(seen + batch["target"], whole)
    share = seen.sum(1) / whole.sum(1)
    assert 0.65 < float(share.mean()) < 0.75
    assert float(share.std()) > 0.03
    again, part = data[np.arange(40)], data[np.arange(7, 20)]
    assert torch.equal(again["target"], batch["target"])
    assert torch.equal(part["target"], batch["target"][7:20])  # a cell is split alike in any batch
    assert not torch.equal(data[Draw(np.arange(40), epoch=1)]["target"], batch["target"])


def test_the_parts_of_a_poisson_count_are_independent():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(3.0, (20_000, 1)).astype(np.float32))
    first, second = split_counts(counts, (0.7, 0.7), repeat(rng, 20_000))
    r = np.corrcoef(first.toarray()[:, 0], second.toarray()[:, 0])[0, 1]
    assert abs(r) < 4 / np.sqrt(20_000)
    assert first.sum() / counts.sum() == pytest.approx(0.7, abs=0.01)


def test_some_cells_may_stay_whole():
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(3.0, (1_000, 20)).astype(np.float32))
    seen, asked = (part.toarray() for part in split_counts(counts, (0.5, 0.5), repeat(rng, 1_000), whole=0.25))
    whole = (seen == asked).all(1) & (seen == counts.toarray()).all(1)
    assert 0.2 < whole.mean() < 0.3
    assert (seen + asked == counts.toarray())[~whole].all()
