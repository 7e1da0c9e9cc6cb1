"""Rows that share the beginning of one of them, as tokens: what the pass `causal` puts into a graph."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch


class NotCausal(ValueError):
    """A mask lets a position see a later one. Never reaches the user."""


NEAR = 64  # positions: rows that begin within so many share a call of attention


class Grouped(NamedTuple):
    """Rows for one call of attention, whose queries are the positions from `start` on."""

    start: int
    bases: torch.Tensor
    keys: torch.Tensor  # the tokens of all positions, row by row
    queries: torch.Tensor  # those from `start` on
    own: torch.Tensor  # which of the queries are a row's own,
    tokens: torch.Tensor  # and their tokens


class Layout:
    """Which tokens a batch of rows has: row r its own from position `starts[r]` on; before that it is row `bases[r]`.

    Tokens are in the rows' order, those of a row in the positions'. Rows that are a base come first, with all positions.
    """

    def __init__(
        self, positions: int, starts: Sequence[int], bases: Sequence[int], device: torch.device | str | None = None
    ):
        self.positions, self.starts, self.bases = positions, list(starts), list(bases)
        self.ends = list(accumulate(positions - s for s in starts))
        firsts = [0, *self.ends[:-1]]
        at = torch.arange(positions)
        start, base = torch.tensor(self.starts), torch.tensor(self.bases)
        own = torch.tensor(firsts)[:, None] + at - start[:, None]
        index = torch.where(at >= start[:, None], own, base[:, None] * positions + at)
        row = torch.repeat_interleave(torch.arange(len(starts)), positions - start)
        self.index = index.to(device)  # (rows, positions): the token
        self.row, self.base = row.to(device), base.to(device)  # (tokens), (rows)
        self.position = (torch.arange(len(row)) - torch.tensor(firsts)[row] + start[row]).to(device)  # (tokens)
        self.of_base = self.base[self.row]  # (tokens): the row of the clean run
        self.masks: dict[int, torch.Tensor] = {}  # that were looked at
        self._groups: dict[int, list[Grouped]] = {}

    def rows(self, count: int) -> int:
        """How many rows `count` tokens are."""
        return bisect.bisect_left(self.ends, count) + 1

    def groups(self, count: int) -> list[Grouped]:
        """The rows that there are, those that begin at about the same position together."""
        n = self.rows(count)
        if n not in self._groups:
            found: dict[int, list[int]] = {}
            for row, start in enumerate(self.starts[:n]):
                found.setdefault(start // NEAR * NEAR, []).append(row)
            self._groups[n] = [self._grouped(start, torch.tensor(found[start])) for start in sorted(found)]
        return self._groups[n]

    def _grouped(self, start: int, rows: torch.Tensor) -> Grouped:
        rows = rows.to(self.base.device)
        index, at = self.index[rows], torch.arange(self.positions, device=self.base.device)
        starts = torch.tensor(self.starts, device=rows.device)[rows]
        own = (at[start:] >= starts[:, None]).reshape(-1).nonzero()[:, 0]
        tokens = index[:, start:].reshape(-1)
        return Grouped(start, self.base[rows], index.reshape(-1), tokens, own, tokens[own])

    def part(self, x: torch.Tensor, rows: int, position: int, start: int, size: int) -> torch.Tensor:
        """Rows `start` to `start + size` of a value held as tokens, all positions: a view, where the tokens are theirs."""
        count = self.positions
        if not any(self.starts[start : start + size]):
            first = self.ends[start] - count
            own = x.narrow(rows, first, size * count)
        else:
            own = x.index_select(rows, self.index[start : start + size].reshape(-1))
        return _untokened(own, rows, position, count)

    def put(self, x: torch.Tensor, rows: int, position: int, start: int, size: int, value: torch.Tensor) -> None:
        """Write rows `start` to `start + size` of a value held as tokens, from the positions on that are theirs."""
        for row in range(start, start + size):
            own = self.positions - self.starts[row]
            place = _untokened(x.narrow(rows, self.ends[row] - own, own), rows, position, own)
            first = self.starts[row]
            if rows == position:
                new = value.narrow(rows, (row - start) * self.positions + first, own)
            else:
                new = value.narrow(rows, row - start, 1).narrow(position, first, own)
            place.copy_(new)


def _untokened(x: torch.Tensor, rows: int, position: int, count: int) -> torch.Tensor:
    """`(rows * count, .., 1, ..)` -> `(rows, .., count, ..)`, a view."""
    if rows == position:
        return x
    apart = x.unflatten(rows, (-1, count))  # the positions stand behind the rows
    gone = position + (position > rows)
    return apart.squeeze(gone).movedim(rows + 1 - (gone < rows + 1), position)


def pack(x: torch.Tensor, rows: int, position: int, pad: int, layout: Layout, count: int) -> torch.Tensor:
    """A value of the clean rows as tokens: `(rows, positions, ...)` -> `(tokens, 1, ...)`.

    `rows` and `position` are dimensions, counted with `pad` dimensions of size 1 before those that `x` has.
    """
    x = x[(None,) * pad] if pad else x
    if x.shape[rows] == 1 and x.shape[position] == layout.positions:  # all rows share it
        return x.index_select(position, layout.position[:count]).transpose(rows, position).contiguous()
    if x.shape[position] == 1:
        return x.index_select(rows, layout.of_base[:count])
    index = layout.of_base[:count] * layout.positions + layout.position[:count]
    found = x.movedim((rows, position), (0, 1)).flatten(0, 1).index_select(0, index)
    return found.movedim(0, rows - (position < rows)).unsqueeze(position).contiguous()


def unpack(x: torch.Tensor, position: int, layout: Layout, count: int) -> torch.Tensor:
    """Tokens as whole rows: `(tokens, .., 1, ..)` -> `(rows, .., positions, ..)`."""
    index = layout.index[: layout.rows(count)]
    return _untokened(x.index_select(0, index.reshape(-1)), 0, position, layout.positions).contiguous()


def repack(x: torch.Tensor, position: int, layout: Layout, count: int) -> torch.Tensor:
    """Whole rows as tokens: `(rows, .., positions, ..)` -> `(tokens, .., 1, ..)`."""
    index = layout.row[:count] * layout.positions + layout.position[:count]
    found = x.movedim(position, 1).flatten(0, 1).index_select(0, index)
    return found.unsqueeze(position).contiguous()


def spread(x: torch.Tensor, layout: Layout, count: int) -> torch.Tensor:
    """A value of the clean rows for each row."""
    return x.index_select(0, layout.base[: layout.rows(count)])


def choose(x: torch.Tensor, positions: torch.Tensor, layout: Layout, count: int) -> torch.Tensor:
    """Of tokens, one position of each row: `(tokens, 1, ...)` -> `(rows, 1, ...)`."""
    index = layout.index[: layout.rows(count)]
    return x.index_select(0, index.gather(1, positions[: len(index), None])[:, 0])


def expect_causal(weights: torch.Tensor) -> torch.Tensor:
    """Attention weights `(..., queries, keys)`, none of which may be on a later key: `NotCausal`."""
    if not bool((weights.triu(1) == 0).all()):
        raise NotCausal("attention weights are on later positions")
    return weights


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    layout: Layout,
    count: int,
    is_causal: bool,
    clean: tuple[bool, bool, bool],
    **how: object,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of tokens: `(tokens, heads, 1, width)`, each over the positions up to its own.

    Those that are `clean` are the clean run's, whole: `(rows, heads, positions, width)`. `NotCausal` where the mask, which
    is the clean run's, lets a position see a later one.
    """
    if mask is None and not is_causal:
        raise NotCausal("attention has no mask")
    if mask is not None and not is_causal:
        _look(mask, layout)
    found = []
    groups = layout.groups(count)
    for group in groups:
        start, size = group.start, layout.positions
        wanted = ((q, group.queries, size - start), (k, group.keys, size), (v, group.keys, size))
        qs, ks, vs = (
            x[group.bases][:, :, -n:]
            if own
            else x[:, :, 0].index_select(0, index).unflatten(0, (-1, n)).transpose(1, 2)
            for (x, index, n), own in zip(wanted, clean, strict=True)
        )
        allowed = None if mask is None else _of_rows(mask, group)
        if is_causal and start:
            allowed = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()[start:]
        done = torch.nn.functional.scaled_dot_product_attention(
            *(qs, ks, vs), attn_mask=allowed, is_causal=is_causal and not start, **how
        )
        found.append(done.transpose(1, 2).flatten(0, 1).index_select(0, group.own))
    if len(groups) == 1:  # in the tokens' order
        return found[0].unsqueeze(2)
    return torch.cat(found).index_select(0, torch.cat([g.tokens for g in groups]).argsort()).unsqueeze(2)


def _of_rows(mask: torch.Tensor, group: Grouped) -> torch.Tensor:
    if mask.dim() == 4 and mask.shape[0] != 1:
        mask = mask.index_select(0, group.bases)
    return mask[..., group.start :, :]


def _look(mask: torch.Tensor, layout: Layout) -> None:
    """Is what a mask leaves of later positions nothing? One that only makes them small has to leave an earlier one."""
    if layout.masks.get(id(mask)) is mask:
        return
    if mask.shape[-2:] != (layout.positions, layout.positions):
        raise NotCausal("the mask is not of all positions against all")
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        fine = not (mask & later).any()
    else:
        least = torch.finfo(mask.dtype).min
        never = ((mask == -torch.inf) | ~later).all()
        small = ((mask <= least) | ~later).all() and ((mask > least / 2) & ~later).any(-1).all()
        fine = bool(never | small)
    if not fine:
        raise NotCausal("the mask lets a position see later ones")
    layout.masks[id(mask)] = mask
