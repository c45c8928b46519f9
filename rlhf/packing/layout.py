"""Pack a right-padded batch into one padding-free row, and unpack it.

Suffixes of tensors: R rows of the padded batch, L its length, N its real tokens (R*L without padding), P segments,
T tokens of the packed row (N minus the shared prefixes), H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MODES = ("pairs", "rows")


@dataclass(frozen=True)
class Layout:
    """The position of each token of a padded batch in one packed row.

    Attributes:
        segments: (prefix, chosen, rejected) token counts, in the order of the packed row, which has
            `[prefix chosen rejected]` per segment; a row that shares nothing, or everything, is (length, 0, 0).
        token_index_T: int64; packed token t is token `token_index_T[t]` of the flattened (R*L) padded batch.
        position_ids_T: int64; starts at 0 in each segment, and `rejected` continues after the prefix.
        padded_index_N: int64; the non-padding positions of the flattened (R*L) padded batch...
        packed_index_N: int64; ...and the packed token whose hidden state belongs there (twice for prefix tokens).
    """

    segments: list[tuple[int, int, int]]
    token_index_T: torch.Tensor
    position_ids_T: torch.Tensor
    padded_index_N: torch.Tensor
    packed_index_N: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_index_T.numel()


def longest_sequence(segments: list[tuple[int, int, int]]) -> int:
    """Tokens of the longest row that the segments hold."""
    return max((p + max(c, r) for p, c, r in segments), default=0)


def is_right_padded(attention_mask_RL: torch.Tensor) -> bool:
    """Whether each row of a 0/1 mask is ones followed by zeros."""
    mask = attention_mask_RL.bool()
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def packed_layout(input_ids_RL: torch.Tensor, attention_mask_RL: torch.Tensor, mode: str) -> Layout:
    """The layout that packs a right-padded batch into one row without padding.

    Args:
        input_ids_RL: (R, L) int64.
        attention_mask_RL: (R, L), 1 for real tokens, then 0 (`is_right_padded`); a row may be empty.
        mode: `rows` shares nothing. `pairs` takes the first half of the rows as chosen and the second half as rejected,
            the order of TRL's collators for DPO and rewards, and packs the longest common prefix of rows i and i + R/2
            once. Two rows that differ each keep at least one token of their own; equal rows are packed once, so that
            they stay bitwise equal and a metric like `chosen > rejected` stays false. Any two rows may be a pair: a
            common prefix has the same hidden states under causal attention, whether it is a prompt or not. An odd
            number of rows has no pairs and is packed as `rows`.

    Returns:
        A Layout with index tensors on the device of `input_ids_RL`.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> layout = packed_layout(
        ...     torch.tensor([[5, 6, 7, 0], [5, 6, 8, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), "pairs"
        ... )
        >>> layout.segments  # 5 6 | 7 | 8 9
        [(2, 1, 2)]
        >>> layout.token_index_T.tolist(), layout.position_ids_T.tolist()
        ([0, 1, 2, 6, 7], [0, 1, 2, 2, 3])
        >>> layout.padded_index_N.tolist(), layout.packed_index_N.tolist()  # 5 and 6 go back to both rows
        ([0, 1, 2, 4, 5, 6, 7], [0, 1, 2, 0, 1, 3, 4])

    Source: arXiv:2410.20305 (sharing the prompt of a preference pair).
    """
    if mode not in MODES:
        raise ValueError(f"packing mode '{mode}' is unknown; expected {' or '.join(MODES)}")
    num_rows, length = input_ids_RL.shape
    paired = mode == "pairs" and num_rows % 2 == 0
    if paired:
        segments = pair_segments(input_ids_RL, attention_mask_RL)
    else:
        segments = [(n, 0, 0) for n in attention_mask_RL.sum(dim=1).tolist()]
    indices = _indices(segments, length, num_rows // 2 if paired else None)
    return Layout(segments, *(index.to(input_ids_RL.device, non_blocking=True) for index in indices))


def pair_segments(input_ids_RL: torch.Tensor, attention_mask_RL: torch.Tensor) -> list[tuple[int, int, int]]:
    """Lengths of the prefix that rows i and i + R/2 share, and of the rest of each: 0 if the rows are equal, else at
    least one token, unless the row is empty."""
    mask = attention_mask_RL.bool()
    (chosen, rejected), (chosen_mask, rejected_mask) = input_ids_RL.chunk(2), mask.chunk(2)
    same = (chosen == rejected) & chosen_mask & rejected_mask
    common = same.long().cumprod(dim=1).sum(dim=1)
    chosen_length, rejected_length = chosen_mask.sum(dim=1), rejected_mask.sum(dim=1)
    equal = (common == chosen_length) & (common == rejected_length)
    prefix = torch.minimum(common, torch.minimum(chosen_length, rejected_length) - 1).clamp(min=0)
    prefix = torch.where(equal, common, prefix)
    lengths = torch.stack([prefix, chosen_length - prefix, rejected_length - prefix], dim=1)
    return [(p, c, r) for p, c, r in lengths.tolist()]  # the only GPU synchronisation in this file


def _indices(segments, length: int, second_row: int | None) -> tuple[torch.Tensor, ...]:
    """token_index_T, position_ids_T, padded_index_N and packed_index_N, on the CPU.

    Segment i is row i and, unless `second_row` is None, row i + second_row.
    """
    tokens, positions, padded, packed = [], [], [], []
    start = 0  # of the segment in the packed row
    for row, (p, c, r) in enumerate(segments):
        first = row * length  # of the row in the flattened padded batch
        tokens.append(torch.arange(first, first + p + c))
        positions.append(torch.arange(p + c))
        padded.append(tokens[-1])
        packed.append(torch.arange(start, start + p + c))
        if second_row is not None:
            second = (row + second_row) * length
            tokens.append(torch.arange(second + p, second + p + r))
            positions.append(torch.arange(p, p + r))
            padded.append(torch.arange(second, second + p + r))
            packed += [torch.arange(start, start + p), torch.arange(start + p + c, start + p + c + r)]
        start += p + c + r
    return tuple(torch.cat(parts) for parts in (tokens, positions, padded, packed))


def unpack(values_TH: torch.Tensor, layout: Layout, num_rows: int, length: int) -> torch.Tensor:
    """Scatter values of packed tokens back to (R, L, H), with zeros for padding.

    Differentiable; the gradient of a shared token is the sum over its two copies.
    """
    padded_index, packed_index = (x.to(values_TH.device) for x in (layout.padded_index_N, layout.packed_index_N))
    padded = values_TH.new_zeros(num_rows * length, *values_TH.shape[1:])
    padded = padded.index_copy(0, padded_index, values_TH.index_select(0, packed_index))
    return padded.view(num_rows, length, *values_TH.shape[1:])
