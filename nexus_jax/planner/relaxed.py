"""A bound on every plan: the linear program in which a plan may be a mixture of paths and of options.

    minimise    sum of ticks * x                                    x: how much each option of each boundary is used
    such that   one unit flows from the first cut to the last
                kept[j] = kept[j - 1] + sum of kept * x into cut j
                kept[j] + sum of working * x into cut j <= budget    for every cut j

Only the corners of the convex hull of each boundary's options matter to it, so it drops no labels, and the more equal
boundaries there are, the nearer it comes (Shapley and Folkman; Starr 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

_DOUBT = 1e-6  # of the bound: the solver's tolerance


def bound(cuts: int, edges: Sequence[Any], budget: int) -> float:
    """Ticks that every path within ``budget`` costs at least; 0 if the solver has no answer.

    Args:
        cuts, edges: of the :class:`allocate.Frontier`.
    """
    corners = [e.corners or e.bounds or e.options for e in edges]
    counts = [len(c) for c in corners]
    column = lambda name: np.array([getattr(o, name) for c in corners for o in c], float)
    kept, working, ticks = column("kept"), column("working"), column("ticks")
    start, stop = (np.repeat([getattr(e, name) for e in edges], counts) for name in ("start", "stop"))
    n, unit, scale = len(ticks), max(budget, 1) / 1e3, max(ticks.max(initial=0.0), 1.0) / 1e3
    flow = scipy.sparse.coo_array(
        (np.repeat([1.0, -1.0], n), (np.concatenate([start, stop]), np.tile(np.arange(n), 2))), (cuts, n)
    ).tocsr()[:-1]
    into = lambda values: scipy.sparse.coo_array((values / unit, (stop - 1, np.arange(n))), (cuts - 1, n))
    step = scipy.sparse.diags_array([np.ones(cuts - 1), -np.ones(cuts - 2)], offsets=(0, -1))  # type: ignore[arg-type]
    equal = scipy.sparse.block_array([[flow, None], [-into(kept), step]])
    answer = scipy.optimize.linprog(
        np.concatenate([ticks / scale, np.zeros(cuts - 1)]),
        A_ub=scipy.sparse.hstack([into(working), scipy.sparse.eye_array(cuts - 1)]),
        b_ub=np.full(cuts - 1, budget / unit),
        A_eq=equal,
        b_eq=np.concatenate([[1.0], np.zeros(cuts - 2), np.zeros(cuts - 1)]),
        method="highs",
    )
    return answer.fun * scale * (1 - _DOUBT) if answer.status == 0 else 0.0
