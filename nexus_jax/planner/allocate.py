"""Over boundaries, exactly: one option for each, so that the peak of the whole step is paid for with the least time.

The backward pass runs the boundaries in reverse. While boundary i is differentiated, everything that boundaries 0..i
keep is alive, and what boundary i makes again besides. So a step's peak is

    max over i of (kept[0] + ... + kept[i] + working[i]),

and read from the last boundary to the first it is a recursion that knows no budget:  peak' = kept + max(peak, working).
One pass therefore gives the whole frontier of (peak, time), for every budget at once. What is kept early is alive for
longest, so the recursion recomputes early and saves late by itself, and the last boundary, whose recomputation frees
nothing, is left alone.

The places where the program may be cut are the nodes of a graph, a boundary from one to a later one is an edge, and a
plan is a path: how fine the boundaries are is chosen together with what they keep.

Only labels that no other beats in both peak and time go on. Where there are more than ``limit``, some are dropped, which
can only make the plan worse, and a second pass over labels that are too good by construction bounds how much. That bound
is tight for a few unlike boundaries; for many equal ones a linear program is (:mod:`relaxed`), and the better of both counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nexus_jax.planner import relaxed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One way to run a boundary.

    Attributes:
        kept: bytes on the device from its forward to its backward.
        working: bytes on the device while it is differentiated, beside what is kept.
        ticks: what it costs in time.
        what: whatever the caller knows it by.
        host: bytes on the host from its forward to its backward.
    """

    kept: int
    working: int
    ticks: int
    what: Any = None
    host: int = 0


@dataclasses.dataclass(frozen=True)
class Edge:
    """A boundary from cut ``start`` to cut ``stop``, and its options.

    Attributes:
        bounds: options that need not exist, one of which is at least as good in everything as any way there is to run
            the boundary; empty where the options are all the ways there are.
        corners: such options again, but at least as good in every weighted sum of bytes and ticks; empty for ``bounds``.
    """

    start: int
    stop: int
    options: tuple[Option, ...]
    bounds: tuple[Option, ...] = ()
    corners: tuple[Option, ...] = ()


@dataclasses.dataclass(frozen=True)
class Path:
    """A plan: its peak and time as the model has them, and the chosen (edge, option) in program order."""

    peak: int
    ticks: int
    steps: tuple[tuple[Edge, Option], ...]

    @property
    def host(self) -> int:
        """Bytes on the host at the end of the forward pass."""
        return sum(option.host for _, option in self.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Labels:
    """Undominated (peak, ticks) at one cut, peaks ascending; where each comes from, and the true peak if it is another."""

    peaks: np.ndarray
    ticks: np.ndarray
    edge: np.ndarray
    option: np.ndarray
    before: np.ndarray
    hosts: np.ndarray
    needs: np.ndarray


class Frontier:
    """Every undominated (peak, time) of a program, and the path of each.

    Args:
        cuts: how many places to cut there are; 0 is the start of the program, ``cuts - 1`` its end.
        edges: the boundaries.
        limit: labels that are kept at a cut.
        host: bytes of host memory. Of labels that no other beats in peak and time, those that take more are dropped; one
            that is beaten might have taken less, so that where this binds the frontier need not be whole.

    Attributes:
        exact: whether no label was dropped and every boundary's options were all there are: then ``gap`` is 0.

    Raises:
        ValueError: no path leads from the start to the end.

    Example:
        >>> layer = (Option(kept=8, working=0, ticks=0), Option(kept=0, working=8, ticks=5))
        >>> found = Frontier(4, [Edge(i, i + 1, layer) for i in range(3)])
        >>> [(p, t) for p, t in zip(found.peaks, found.ticks)]  # the last layer need never run again
        [(8, 10), (16, 5), (24, 0)]
        >>> sorted(option.kept for _, option in found.within(16).steps)
        [0, 8, 8]
    """

    def __init__(self, cuts: int, edges: Sequence[Edge], limit: int = 4096, host: int = 0, repeated: bool = False):
        self.cuts, self.edges = cuts, tuple(edges)
        arrays = [_arrays(e.options) for e in self.edges]
        self._labels, dropped = _pass(cuts, self.edges, limit, _thinned, arrays, host, repeated)
        self.exact = not dropped and not any(e.bounds for e in self.edges)
        if self.exact:
            self._bound = self._labels
        else:
            arrays = [_arrays(e.bounds or e.options) for e in self.edges]
            self._bound, _ = _pass(cuts, self.edges, limit, _relaxed, arrays, None, repeated)
        if not len(self._labels[0].peaks):
            raise ValueError("no path of boundaries leads from the start of the program to its end.")

    @property
    def peaks(self) -> list[int]:
        return self._labels[0].peaks.tolist()

    @property
    def ticks(self) -> list[int]:
        return self._labels[0].ticks.tolist()

    def within(self, budget: int) -> Path | None:
        """The fastest path whose peak is at most ``budget`` bytes; None if there is none."""
        at = int(np.searchsorted(self._labels[0].peaks, budget, side="right")) - 1
        return None if at < 0 else self.path(at)

    def bound(self, budget: int) -> int | None:
        """Ticks that every path within ``budget`` costs at least; None if there is no such path."""
        at = int(np.searchsorted(self._bound[0].peaks, budget, side="right")) - 1
        if at < 0:
            return None
        found = int(self._bound[0].ticks[at])
        path = self.within(budget)
        if self.exact or path is None or path.ticks == found:
            return found
        return max(found, math.ceil(relaxed.bound(self.cuts, self.edges, budget)))

    def path(self, at: int) -> Path:
        """The path of point ``at`` of the frontier."""
        peak, ticks = int(self._labels[0].peaks[at]), int(self._labels[0].ticks[at])
        steps, cut = [], 0
        while cut != self.cuts - 1:
            labels = self._labels[cut]
            edge = self.edges[labels.edge[at]]
            steps.append((edge, edge.options[labels.option[at]]))
            cut, at = edge.stop, int(labels.before[at])
        return Path(peak, ticks, tuple(steps))


def price_of(options: Sequence[Option]) -> tuple[int, int]:
    """The peak and the ticks of options in program order, in integers, whoever chose them."""
    kept, peak = 0, 0
    for option in options:
        kept += option.kept
        peak = max(peak, kept + option.working)
    return peak, sum(option.ticks for option in options)


def _arrays(options: Sequence[Option]) -> tuple[np.ndarray, ...]:
    names = ("kept", "working", "ticks", "host")
    return tuple(np.array([getattr(o, n) for o in options], np.int64) for n in names)


def _pass(
    cuts: int, edges: Sequence[Edge], limit: int, fewer: Any, arrays: list[Any], host: int | None, repeated: bool
) -> tuple[list[_Labels], bool]:
    """Labels at every cut, from the end of the program to its start; whether some were dropped."""
    leaving: list[list[int]] = [[] for _ in range(cuts)]
    for n, edge in enumerate(edges):
        leaving[edge.start].append(n)
    none = np.zeros(0, np.int64)
    zero = np.zeros(1, np.int64)
    labels = [_Labels(*[none] * 7) for _ in range(cuts)]
    labels[cuts - 1] = _Labels(*[zero] * 7)
    dropped = False
    for cut in reversed(range(cuts - 1)):
        found = [_extended(n, arrays[n], labels[edges[n].stop], repeated) for n in leaving[cut]]
        if found:
            columns = [np.concatenate(column) for column in zip(*found, strict=True)]
            fits = columns[_HOSTS] <= (math.inf if host is None else host)
            dropped |= not fits.all()
            labels[cut] = _undominated(*(column[fits] for column in columns))
        if len(labels[cut].peaks) > limit:
            labels[cut] = fewer(labels[cut], limit)
            dropped = True
    return labels, dropped


_HOSTS = [f.name for f in dataclasses.fields(_Labels)].index("hosts")


def _extended(n: int, arrays: Any, after: _Labels, repeated: bool) -> tuple[np.ndarray, ...]:
    """The labels at an edge's stop, extended by each of its options."""
    kept, working, ticks, host = (a[:, None] for a in arrays)
    needs = kept + np.maximum(after.needs[None], working)
    peaks = kept + (after.peaks[None] if repeated else np.maximum(after.peaks[None], working))
    total = ticks + after.ticks[None]
    option, before = np.indices(peaks.shape)
    hosts = host + after.hosts[None]
    edge = np.full(peaks.shape, n)
    return tuple(column.ravel() for column in (peaks, total, edge, option, before, hosts, needs))


def _undominated(peaks: np.ndarray, ticks: np.ndarray, *rest: np.ndarray) -> _Labels:
    order = np.lexsort((*rest[-2:], ticks, peaks))
    best = np.minimum.accumulate(ticks[order])
    keep = order[np.concatenate([[True], best[1:] < best[:-1]])] if len(order) else order
    return _Labels(peaks[keep], ticks[keep], *(column[keep] for column in rest))


def _thinned(labels: _Labels, limit: int) -> _Labels:
    """Some of the labels, evenly over the peaks; the first and the last among them."""
    edges = np.linspace(labels.peaks[0], labels.peaks[-1], limit - 1)
    at = np.unique(np.concatenate([np.searchsorted(labels.peaks, edges, side="right") - 1, [len(labels.peaks) - 1]]))
    return _Labels(*(getattr(labels, f.name)[at] for f in dataclasses.fields(labels)))


def _relaxed(labels: _Labels, limit: int) -> _Labels:
    """Fewer labels, each at least as good as all those that it stands for."""
    edges = np.linspace(labels.peaks[0], labels.peaks[-1], limit)
    group = np.searchsorted(edges, labels.peaks, side="right") - 1
    first = np.unique(group, return_index=True)[1]
    last = np.append(first[1:], len(labels.peaks)) - 1
    picked = _Labels(*(getattr(labels, f.name)[last] for f in dataclasses.fields(labels)))
    return dataclasses.replace(picked, peaks=labels.peaks[first])
