from collections import Counter

import torch

from dist_sae.config.data import ExcludeConfig
from dist_sae.data.row_filters import kept_by_norm, kept_by_token_rules
from dist_sae.data.tokens import Context, TokenBatch, pack

BOS, EOS = 1, 2


def batch(*contexts: list[int], bos: int | None = BOS) -> TokenBatch:
    (packed,) = pack(
        [Context(n, 0, tokens) for n, tokens in enumerate(contexts)], batch_tokens=1000, bos=bos
    )
    return packed


def kept(tokens: TokenBatch, rules: ExcludeConfig) -> tuple[list[list[int]], dict[str, int]]:
    excluded: Counter[str] = Counter()
    keep = kept_by_token_rules(tokens, frozenset({BOS, EOS}), rules, excluded)
    assert int(keep.sum()) + excluded.total() == keep.numel()
    rows = [row[k].tolist() for row, k in zip(tokens.tokens, keep, strict=True)]
    return rows, {reason: count for reason, count in excluded.items() if count}


def test_each_row_is_left_out_for_one_reason_and_counted() -> None:
    """Each excluded row is counted under exactly one reason.

    Context 1 has BOS and an EOS inside. Context 2 has BOS and two padding tokens.
    """
    tokens = batch([BOS, 10, EOS, 12], [BOS, 20])
    rows, excluded = kept(tokens, ExcludeConfig(special_tokens=True, first_positions=1))
    assert rows == [[10, 12], [20]]
    assert excluded == {"padding": 2, "special_token": 3}


def test_first_positions_count_from_the_start_of_the_context_with_bos() -> None:
    tokens = batch([BOS, 10, 11, 12], [BOS, 20])
    rows, excluded = kept(tokens, ExcludeConfig(first_positions=3))
    assert rows == [[12], []]
    assert excluded == {"padding": 2, "special_token": 2, "first_position": 3}


def test_first_positions_without_bos() -> None:
    rows, excluded = kept(batch([10, 11, 12], [20], bos=None), ExcludeConfig(first_positions=1))
    assert rows == [[11, 12], []]
    assert excluded == {"padding": 2, "first_position": 2}


def test_special_tokens_of_the_text_enter_when_they_may_but_bos_in_front_never_does() -> None:
    tokens = batch([BOS, 10, EOS, BOS], [BOS, 20])
    rows, excluded = kept(tokens, ExcludeConfig(special_tokens=False, first_positions=0))
    assert rows == [[10, EOS, BOS], [20]]
    assert excluded == {"padding": 2, "special_token": 2}


def test_padding_is_no_special_token_even_where_its_id_is_one() -> None:
    excluded: Counter[str] = Counter()
    tokens = batch([BOS, 10, 11], [BOS])
    kept_by_token_rules(tokens, frozenset({0, BOS}), ExcludeConfig(), excluded)
    assert excluded == {"padding": 2, "special_token": 2, "first_position": 0}


def test_counts_add_up_over_batches() -> None:
    excluded: Counter[str] = Counter()
    for _ in range(3):
        kept_by_token_rules(batch([BOS, 10], [BOS]), frozenset({BOS}), ExcludeConfig(), excluded)
    assert excluded == {"padding": 3, "special_token": 6, "first_position": 0}


def test_rows_of_unusual_norm_are_told_by_the_median() -> None:
    """Rows are excluded by their norm relative to the median.

    Norms are 1, 2, 3, 20 and 100, so the median is 3. 10 x admits up to 30, and 6 x up to 18.
    """
    acts = torch.tensor([[1.0, 0], [0, -2], [3, 0], [12, 16], [60, 80]])
    assert kept_by_norm(acts, 10.0).tolist() == [True, True, True, True, False]
    assert kept_by_norm(acts, 6.0).tolist() == [True, True, True, False, False]
    assert kept_by_norm(acts, None).all()


def test_norms_are_taken_in_fp32() -> None:
    """Norms are computed in fp32.

    |(100, 9)| = 100.404 exceeds 1.003 x 100. In bf16 both would be 100.5.
    """
    acts = torch.tensor([[100.0, 0], [100, 0], [100, 9]], dtype=torch.bfloat16)
    assert kept_by_norm(acts, 1.003).tolist() == [True, True, False]


def test_no_rows_are_no_error() -> None:
    assert kept_by_norm(torch.zeros(0, 3), 10.0).tolist() == []
