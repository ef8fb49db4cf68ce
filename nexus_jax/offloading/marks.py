"""Names by which a program says where its stages end and what of it waits on the host, through differentiation."""

from __future__ import annotations

from typing import Any

from jax.extend import core as jex

HOST = "nexus_jax.offload"  # that of nexus_jax.policy.places.OFFLOAD: what leaves
END = "nexus_jax.end"  # what a stage hands on


def cuts(jaxpr: Any) -> list[int]:
    """Where the stages of a program begin, but for the first: after the last of the names in each run of :data:`END`."""
    ends = [eqn.primitive.name == "name" and eqn.params["name"] == END for eqn in jaxpr.eqns]
    found = [i + 1 for i, end in enumerate(ends) if end and not ends[i + 1 : i + 2] == [True]]
    return [i for i in found if i < len(jaxpr.eqns)]


def leaving(jaxpr: Any) -> set[Any]:
    """The variables that leave: those with the name :data:`HOST`, what they are named after, and the same values again.

    ``jax.checkpoint`` puts a ``reduce_precision`` that changes nothing behind what it saves.
    """
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name" and (eqn.params["name"] == HOST or eqn.invars[0] in found):
            found |= {eqn.invars[0], eqn.outvars[0]}
        elif eqn.primitive.name == "reduce_precision" and eqn.invars[0] in found:
            found.add(eqn.outvars[0])
    return {v for v in found if not isinstance(v, jex.Literal)}
