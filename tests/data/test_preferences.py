"""The loader: every good record once an epoch, in an order that depends on the seed alone, from any state on."""

import itertools
import json
import subprocess
import sys
from collections import Counter

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.data.builder import write_split
from spo_jax.data.preferences import PairLoader, open_pairs
from spo_jax.errors import UserError
from tests.preference_data import DAMAGE, damage, record
from tests.system.commands import ROOT

GOOD = [record(i) for i in range(23)]
MIXED = [damage(r, list(DAMAGE)[i // 3]) if i % 3 == 0 else r for i, r in enumerate(GOOD)]
MIXED[4] = record(4, has_label=False)
GOOD_OF_MIXED = [i for i in range(23) if i % 3 and i != 4]


def make(source, batch_size=4, **options):
    options = {"size": (8, 8), "seed": 0, "num_workers": 0} | options
    return PairLoader(source, batch_size=batch_size, **options)


def numbers(batches):
    """The records in batches, by the number in their caption; rows that fill up left out."""
    return [int(c.split()[1]) for batch in batches for c in batch.captions if c]


def positions(batches):
    return np.concatenate([batch.positions for batch in batches])


def take(loader, count):
    return list(itertools.islice(loader, count))


def test_what_a_batch_holds():
    (batch,) = take(make(GOOD, shuffle=False, size=(8, 6)), 1)
    assert batch.captions == ["caption 0", "caption 1", "caption 2", "caption 3"]
    chex.assert_shape(batch.images, (4, 2, 8, 6, 3))
    chex.assert_shape(batch.crops, (4, 2, 4))
    chex.assert_type([batch.images, batch.labels, batch.weights], [np.uint8, np.float32, np.float32])
    np.testing.assert_array_equal(batch.labels, [[1, 0], [0, 1], [0.5, 0.5], [1, 0]])
    np.testing.assert_allclose(batch.weights, [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_array_equal(batch.positions, [0, 1, 2, 3])


# ------------------------------------------------------------------------------------------------------------- order
def test_every_record_once_an_epoch_across_batches():
    batches = take(make(GOOD), 23)  # 92 = 4 epochs
    epochs = np.reshape(numbers(batches), (4, 23))
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(positions(batches), np.arange(92))


def test_seeds_have_orders_of_their_own():
    def order(**options):
        return numbers(take(make(GOOD, **options), 12))

    assert order() == order()
    assert order(seed=1) != order()
    assert order(seed=1)[:23] != order()[23:46]  # nor is one seed the other, an epoch later
    assert order(seed=-(2**40)) == order(seed=-(2**40))
    assert order(shuffle=False)[:46] == [*range(23), *range(23)]


def test_the_order_is_near_a_uniform_one():
    # Of 200 seeds, each record comes first about as often as another (chi squared, 22 degrees of freedom, p = 1e-4).
    firsts = Counter(numbers(take(make(GOOD, batch_size=1, seed=seed), 1))[0] for seed in range(200))
    assert sum((firsts[i] - 200 / 23) ** 2 / (200 / 23) for i in range(23)) < 55


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_processes_makes_the_same_global_batches(count):
    together = take(make(MIXED, 8), 9)
    shares = [take(make(MIXED, 8 // count, process_index=i, process_count=count), 9) for i in range(count)]
    for batch, *parts in zip(together, *shares, strict=True):
        for i, part in enumerate(parts):
            assert part.captions == batch.captions[i::count]
            for key in ("images", "labels", "weights", "positions"):
                np.testing.assert_array_equal(getattr(part, key), getattr(batch, key)[i::count])


@given(batch_size=st.integers(1, 30))
def test_damaged_records_leave_rows_of_weight_zero(batch_size):
    batches = take(make(MIXED, batch_size), -(-3 * 23 // batch_size))
    seen = [
        (batch.captions[row], place)
        for batch in batches
        for row, place in enumerate(batch.positions)
        if 0 <= place < 3 * 23
    ]
    for epoch in range(3):
        good = [int(caption.split()[1]) for caption, place in seen if place // 23 == epoch]
        assert sorted(good) == GOOD_OF_MIXED
    for number, batch in enumerate(batches):
        chex.assert_shape(batch.images, (batch_size, 2, 8, 8, 3))
        unused = batch.positions == -1
        np.testing.assert_array_equal(batch.weights == 0, unused)
        np.testing.assert_array_equal(batch.positions[~unused], (np.arange(batch_size) + number * batch_size)[~unused])
        np.testing.assert_array_equal(batch.labels.sum(axis=1), 1)  # no row can make a loss that is not finite


# ------------------------------------------------------------------------------------------------------------- state
@settings(max_examples=15)
@given(before=st.integers(0, 20), sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_a_state_goes_on_with_the_next_record(before, sizes):
    whole = make(MIXED, 1)
    expected = take(whole, before * sizes[0] + 5 * sizes[1])
    first = make(MIXED, sizes[0])
    batches = take(first, before)
    second = make(MIXED, sizes[1], state=json.loads(json.dumps(first.state())))
    batches += take(second, 5)
    assert numbers(batches) == numbers(expected)
    np.testing.assert_array_equal(positions(batches), positions(expected))
    assert second.state() == whole.state()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_state_of_two_processes_goes_on_with_any_number(count):
    def processes(number, state=None):
        return [make(MIXED, 8 // number, state=state, process_index=i, process_count=number) for i in range(number)]

    def total(loaders):
        """As ``total_state`` gives it, where processes are real ones."""
        states = [loader.state() for loader in loaders]
        assert all(state["position"] == states[0]["position"] for state in states)
        return states[0] | {"counts": dict(sum((Counter(state["counts"]) for state in states), Counter()))}

    whole = make(MIXED, 8)
    expected = take(whole, 12)[7:]
    loaders = processes(2)
    for loader in loaders:
        take(loader, 7)
    loaders = processes(count, total(loaders))
    for i, loader in enumerate(loaders):
        for batch, other in zip(take(loader, 5), expected, strict=True):
            assert batch.captions == other.captions[i::count]
            np.testing.assert_array_equal(batch.positions, other.positions[i::count])
    state = whole.state()
    assert total(loaders) == state | {"counts": {name: n for name, n in state["counts"].items() if n}}


def test_what_an_interruption_finds_half_collected_is_not_lost():
    class Interrupted(list):
        def __getitem__(self, index):
            if index == numbers(expected[1:2])[-1]:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    expected = take(make(MIXED), 4)
    loader = make(Interrupted(MIXED))
    first = take(loader, 1)
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    assert numbers(first + take(make(MIXED, state=loader.state()), 3)) == numbers(expected)


def test_counts_add_up_to_the_records_gone_through():
    loader = make(MIXED)
    for _ in range(30):
        next(loader)
        state = loader.state()
        assert sum(state["counts"].values()) == state["position"]
    assert state["position"] == 120 and state["counts"]["used"] == len(numbers(take(make(MIXED), 30)))


def test_a_state_of_other_data_is_refused():
    state = make(GOOD).state()
    for source, options, words in (
        (GOOD[1:], {}, "num_records = 23, this run 22"),
        (GOOD, {"seed": 1}, "seed = 0, this run 1"),
        (GOOD, {"shuffle": False}, "shuffle = True, this run False"),
        (GOOD, {"keep_only_with_label": False}, "keep_only_with_label = True, this run False"),
    ):
        with pytest.raises(UserError, match=words):
            make(source, state=state, **options)


# ------------------------------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize("how", DAMAGE)
def test_a_fault_is_skipped_and_counted_or_refused(how):
    source = [*GOOD[:5], damage(GOOD[5], how), *GOOD[6:9]]
    name = DAMAGE[how][1]
    loader = make(source, 9)
    assert sorted(numbers(take(loader, 1))) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert {key: count for key, count in loader.state()["counts"].items() if count} == {"used": 8, name: 1}
    with pytest.raises(UserError, match=rf"^Record 5 of the data cannot be used \({name}: .*config.data.strict"):
        take(make(source, 8, strict=True), 2)


def test_records_without_a_label_are_no_fault():
    source = [record(i, has_label=i % 2 == 0) for i in range(8)]
    loader = make(source, strict=True)
    assert sorted(numbers(take(loader, 4))) == [0, 0, 2, 2, 4, 4, 6, 6]
    assert sorted(numbers(take(make(source, keep_only_with_label=False), 2))) == list(range(8))
    blank = [record(0), record(1, has_label=False, caption=b"", label_0=float("nan"))]
    loader = make(blank, strict=True)
    take(loader, 2)
    assert loader.state()["counts"]["unlabelled"] == 4


def test_one_good_record_is_enough():
    source = [*[record(i, image_0=b"") for i in range(1, 8)], GOOD[0]]
    for options in ({"shuffle": True}, {"shuffle": False}):
        assert numbers(take(make(source, **options), 10)) == [0] * 5
        assert numbers(make(source, num_epochs=5, **options)) == [0] * 5
    # Three of four processes never see a good record.
    shares = [make(source, 1, shuffle=False, process_index=i, process_count=4) for i in range(4)]
    assert [numbers(take(loader, 10)) for loader in shares] == [[], [], [], [0] * 5]


def test_data_without_a_good_record_ends_the_run():
    for options in ({}, {"num_epochs": 1}, {"process_index": 1, "process_count": 2}):
        with pytest.raises(UserError, match=r"None of the 2 records .* \(1 unlabelled, 1 picture_missing\)"):
            take(make([record(0, has_label=False), record(1, image_0=b"")], **options), 1)


def test_damaged_prepared_files_are_counted(tmp_path):
    write_split(tmp_path, "train", [record(i) for i in range(60)])
    (path,) = tmp_path.glob("*.array_record*")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    path.write_bytes(data)
    loader = make(open_pairs(f"{tmp_path}@train"), 60, num_epochs=1)
    (batch,) = loader
    counts = loader.state()["counts"]
    assert 1 <= counts["record_broken"] <= 3 and counts["used"] + counts["record_broken"] == 60
    assert sorted(numbers([batch]))[0] == 0 and sorted(numbers([batch]))[-1] == 59


# -------------------------------------------------------------------------------------------------------------- ties
def test_ties_are_used_or_left_out():
    source = [record(i) for i in range(9)]  # every third is a tie
    assert sorted(numbers(take(make(source, 9), 1))) == list(range(9))
    loader = make(source, 9, drop_ties=True, strict=True)
    (batch,) = take(loader, 1)
    assert sorted(numbers([batch])) == [0, 1, 3, 4, 6, 7]
    assert (batch.weights > 0).sum() == 6 and (batch.labels[batch.weights > 0] != 0.5).all()
    counts = loader.state()["counts"]
    assert {name: count for name, count in counts.items() if count} == {"used": 6, "tied": 3}


def test_a_fault_of_a_tie_is_a_fault():
    source = [record(0), damage(record(1), "two winners"), record(2, image_0=b""), record(2, has_label=False)]
    loader = make(source, 4, drop_ties=True)
    take(loader, 1)
    counts = {name: count for name, count in loader.state()["counts"].items() if count}
    assert counts == {"used": 1, "labels_do_not_add_up": 1, "picture_missing": 1, "unlabelled": 1}


def test_data_of_ties_alone_ends_the_run():
    with pytest.raises(UserError, match=r"None of the 3 records .* \(2 tied, 1 picture_missing\)"):
        take(make([record(2), record(2, image_1=b""), record(5)], shuffle=False, drop_ties=True), 1)


def test_a_state_of_before_ties_were_counted_goes_on():
    whole = make(MIXED, 4)
    expected = take(whole, 5)
    first = make(MIXED, 4)
    take(first, 3)
    state = first.state()
    del state["counts"]["tied"], state["stream"]["drop_ties"]
    second = make(MIXED, 4, state=state)
    assert numbers(take(second, 2)) == numbers(expected[3:])
    assert second.state() == whole.state()
    with pytest.raises(UserError, match="drop_ties = False, this run True"):
        make(MIXED, 4, state=state, drop_ties=True)


# ------------------------------------------------------------------------------------------------------ single passes
@given(batch_size=st.integers(1, 30), count=st.integers(1, 4), epochs=st.integers(1, 2))
@pytest.mark.parametrize("source", [GOOD, MIXED], ids=["good", "mixed"])
def test_a_single_pass_has_as_many_batches_for_every_process(source, batch_size, count, epochs):
    loaders = [
        make(source, batch_size, shuffle=False, num_epochs=epochs, process_index=i, process_count=count)
        for i in range(count)
    ]
    shares = [list(loader) for loader in loaders]
    assert {len(share) for share in shares} == {loaders[0].num_batches}
    batches = [batch for share in shares for batch in share]
    good = list(range(23)) if source is GOOD else GOOD_OF_MIXED
    assert sorted(numbers(batches)) == sorted(good * epochs)
    for batch in batches:
        assert len(batch.captions) == len(batch.images) == batch_size
        np.testing.assert_array_equal(batch.weights == 0, batch.positions == -1)
    totals = sum((Counter(loader.state()["counts"]) for loader in loaders), Counter())
    assert totals.total() == 23 * epochs and totals["used"] == len(good) * epochs


def test_a_single_pass_goes_on_from_a_state():
    loader = make(MIXED, 5, num_epochs=1)
    first = take(loader, 2)
    rest = list(make(MIXED, 5, num_epochs=1, state=loader.state()))
    assert numbers(first + rest) == numbers(make(MIXED, 5, num_epochs=1))
    list(loader)
    assert list(make(MIXED, 5, num_epochs=1, state=loader.state())) == []


# ---------------------------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize("shared_memory", [True, False])
def test_workers_change_nothing(tmp_path, monkeypatch, shared_memory):
    if not shared_memory:
        monkeypatch.setattr("shutil.disk_usage", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    write_split(tmp_path, "train", MIXED)
    source = open_pairs(f"{tmp_path}@train")
    alone = make(source)
    expected = take(alone, 8)
    for workers in (1, 3) if shared_memory else (2,):
        loader = make(source, num_workers=workers)
        batches = take(loader, 8)
        loader.close()
        assert loader.state() == alone.state()
        for batch, other in zip(batches, expected, strict=True):
            assert batch.captions == other.captions
            for key in ("images", "labels", "weights", "positions"):
                np.testing.assert_array_equal(getattr(batch, key), getattr(other, key))


def test_more_workers_than_records(tmp_path):
    write_split(tmp_path, "train", GOOD[:2])
    source = open_pairs(f"{tmp_path}@train")
    loader = make(source, num_workers=3, num_epochs=1, shuffle=False)
    assert numbers(loader) == [0, 1]
    loader.close()


def test_nothing_of_the_models_is_imported():
    script = (
        "import sys, spo_jax.data.preferences, spo_jax.data.records, spo_jax.data.sources, spo_jax.data.builder\n"
        "assert not [m for m in sys.modules if m.startswith(('flax', 'spo_jax.models', 'tensorflow.', 'torch'))]\n"
        "import jax; assert not jax._src.xla_bridge._backends"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
