"""Which rows are chosen, and what each stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stability.attention.call import AttentionCall
from stability.attention.rows import RowSelection, SelectedRows, select_rows


def select(
    rows: int | Tensor | None, tokens: int, lengths: list[int] | None = None, seed: int = 0
) -> SelectedRows:
    return select_rows(
        rows,
        batch=len(lengths) if lengths else 2,
        tokens=tokens,
        lengths=None if lengths is None else torch.tensor(lengths),
        device=torch.device("cpu"),
        seed=seed,
    )


@pytest.mark.parametrize("rows", [None, 5, 6])
def test_all_rows(rows: int | None) -> None:
    chosen = select(rows, tokens=5, lengths=[5, 2])
    assert chosen.coverage == "all"
    assert chosen.rows.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert chosen.weights.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


@given(num_rows=st.integers(1, 20), lengths=st.lists(st.integers(0, 60), min_size=1), seed=st.integers(0, 99))
def test_sample_is_one_row_a_stratum(num_rows: int, lengths: list[int], seed: int) -> None:
    chosen = select(num_rows, tokens=60, lengths=lengths, seed=seed)
    assert chosen.coverage == "sampled"
    for rows, weights, length in zip(chosen.rows, chosen.weights, lengths, strict=True):
        assert weights.sum() == length
        taken = rows[weights > 0].tolist()
        assert taken == sorted(set(taken))
        assert len(taken) == min(num_rows, length)
        edges = [i * length // num_rows for i in range(num_rows + 1)]
        assert all(
            low <= row < high
            for row, low, high in zip(rows.tolist(), edges, edges[1:], strict=False)
            if high > low
        )
        assert 0 <= rows.min() <= rows.max() < 60


def test_sample_depends_on_the_seed_only() -> None:
    first = select(8, tokens=1000, seed=3)
    torch.manual_seed(99)
    assert torch.equal(select(8, tokens=1000, seed=3).rows, first.rows)
    assert not torch.equal(select(8, tokens=1000, seed=4).rows, first.rows)
    assert not torch.equal(first.rows[0], first.rows[1])


def test_sampling_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    select(8, tokens=1000)
    assert torch.equal(torch.rand(3), expected)


def test_every_row_of_a_stratum_is_equally_likely() -> None:
    counts = torch.zeros(10)
    for seed in range(400):
        counts[select(2, tokens=10, seed=seed).rows[0]] += 1
    # 400 draws among 5 rows a stratum: mean 80, standard deviation 8.
    assert (counts - 80).abs().max() < 5 * 8


def test_given_rows_beyond_the_length_have_no_weight() -> None:
    chosen = select(torch.tensor([4, 1]), tokens=5, lengths=[5, 2])
    assert chosen.coverage == "given"
    assert chosen.weights.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (0, ValueError, "at least 1, or None for all rows; got 0"),
        (-3, ValueError, "at least 1"),
        (True, TypeError, "got bool"),
        (1.5, TypeError, "got float"),
        ([1, 2], TypeError, "got list"),
        (torch.tensor([0.5]), TypeError, "integer positions; got torch.float32"),
        (torch.tensor([True]), TypeError, "integer positions; got torch.bool"),
        (torch.zeros(0).long(), ValueError, r"got \(0,\)"),
        (torch.zeros(3, 1).long(), ValueError, r"batch = 2; got \(3, 1\)"),
        (torch.tensor(1), ValueError, r"got \(\)"),
        (torch.tensor([0, 5]), ValueError, "within 0 and 4; got 0 to 5"),
        (torch.tensor([-1]), ValueError, "within 0 and 4; got -1 to -1"),
    ],
)
def test_bad_rows(rows: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(rows, tokens=5)


class TestRowSelection:
    """Calls alike share what is selected; whatever decides it sets them apart."""

    def call(self, tokens: int = 9, lengths: Tensor | list[int] | None = None) -> AttentionCall:
        query = torch.zeros(2, 3, tokens, 4)
        return AttentionCall("softmax", query, query, query_lengths=lengths)

    @pytest.mark.parametrize("rows", [None, 4])
    def test_calls_alike_get_the_same_tensors(self, rows: int | None) -> None:
        selection = RowSelection(rows, seed=3)
        chosen = selection.of(self.call(), None)
        assert selection.of(self.call(), None) is chosen
        alone = select_rows(rows, batch=2, tokens=9, lengths=None, device=torch.device("cpu"), seed=3)
        assert torch.equal(chosen.rows, alone.rows)
        assert torch.equal(chosen.weights, alone.weights)

    def test_another_shape_or_place_in_the_batch_gets_its_own(self) -> None:
        selection = RowSelection(4, seed=3)
        assert (
            selection.of(self.call(tokens=9), None).rows.max()
            < 9
            <= selection.of(self.call(tokens=90), None).rows.max()
        )
        later = selection.of(self.call(), None, first_sample=2)
        assert not torch.equal(later.rows, selection.of(self.call(), None).rows)

    @pytest.mark.parametrize("rows", [None, 4])
    def test_lengths_that_change_in_place_are_looked_at_again(self, rows: int | None) -> None:
        selection = RowSelection(rows, seed=3)
        as_tensor, as_list = torch.tensor([9, 5]), [9, 5]
        for lengths in (as_tensor, as_list):
            call = self.call(lengths=lengths)
            before = selection.of(call, torch.tensor([9, 5]))
            assert selection.of(call, torch.tensor([9, 5])) is before
            lengths[1] = 0
            assert selection.of(call, torch.tensor([9, 0])).weights.sum(dim=1).tolist() == [9, 0]

    def test_lengths_made_without_versions_are_taken(self) -> None:
        with torch.inference_mode():
            lengths = torch.tensor([9, 5])
        chosen = RowSelection(None, seed=3).of(self.call(lengths=lengths), lengths)
        assert chosen.weights.sum(dim=1).tolist() == [9, 5]
