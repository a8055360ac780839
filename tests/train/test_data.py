"""Which samples make up a global batch is a function of the seed and its number alone."""

from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import DataError
from meshwright.parallel.parameters import shard_rows
from meshwright.train.config import DataTable
from meshwright.train.data import (
    Samples,
    find_files,
    open_samples,
    share_of,
    shuffled,
    training_batches,
    validation_batches,
    write_tokens,
)


@given(st.integers(1, 400), st.integers(0, 3), st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_visits_every_sample_once(count: int, epoch: int, seed: int) -> None:
    assert sorted(shuffled(epoch * count + i, count, seed) for i in range(count)) == list(range(count))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(shuffled(e * 50 + i, 50, s) for i in range(50)) for e in range(3) for s in range(3)}
    assert len(orders) == 9


@given(st.integers(0, 200), st.integers(1, 17))
def test_shares_cover_a_batch_once(total: int, ranks: int) -> None:
    rows = [row for rank in range(ranks) for row in share_of(total, rank, ranks)]
    assert rows == list(range(total))
    sizes = [len(share_of(total, rank, ranks)) for rank in range(ranks)]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 300), st.integers(1, 17))
def test_sharded_rows_cover_a_parameter_once(rows: int, ranks: int) -> None:
    parts = [shard_rows(rows, ranks, rank) for rank in range(ranks)]
    assert [row for first, count in parts for row in range(first, first + count)] == list(range(rows))
    assert all(count <= -(-rows // ranks) for _, count in parts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_mesh(ranks: int) -> None:
    samples = Samples(numpy.arange(5000).astype(numpy.uint8), 7)
    table = DataTable(global_batch=12)
    whole = training_batches(samples, table, 3, 5, 0, 1)
    parts = [training_batches(samples, table, 3, 5, rank, ranks) for rank in range(ranks)]
    for _ in range(4):
        expected = next(whole)[0].tolist()
        assert [row for part in parts for row in next(part)[0].tolist()] == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 16, 17])
def test_validation_uses_each_sample_once_and_every_rank_as_often(ranks: int, count: int) -> None:
    samples = Samples(numpy.arange(count * 4 + 1).astype(numpy.uint8), 4)
    table = DataTable(global_batch=8)
    parts = [list(validation_batches(samples, table, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    rows = sorted(tuple(row) for part in parts for inputs, _ in part for row in inputs.tolist())
    assert len(rows) == len(set(rows)) == count


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(bytes(range(200)) * 4)
    write_tokens(str(text), tmp_path / "run" / "tokens.bin")
    train, validation = open_samples(tmp_path / "run" / "tokens.bin", DataTable(sequence_length=10, global_batch=2))
    inputs, targets = train.batch([3])
    assert inputs[0].tolist() == list(range(30, 40))
    assert targets[0].tolist() == list(range(31, 41))
    assert (train.count, validation.count) == (75, 3)


@pytest.mark.parametrize("source", ["/no/such/file", "/no/such/*.txt"])
def test_a_missing_source_is_one_sentence(source: str) -> None:
    with pytest.raises(DataError, match="no file, folder or glob"):
        find_files(source)


def test_too_little_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="holds 9 training"):
        open_samples(tmp_path / "tokens.bin", DataTable(sequence_length=10, global_batch=16))


def test_globs_and_folders_find_the_same_text(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    assert sorted(find_files(f"{tmp_path}/*.txt")) == sorted(find_files(str(tmp_path)))
