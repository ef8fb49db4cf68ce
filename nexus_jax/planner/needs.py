"""What the backward pass of a flat program needs, and what it is made of.

Every value gets a name, and the program is differentiated: in the equations of its forward half, a name tells which of
the program's values a variable is, and what comes out besides are the residuals. So derived values (``cos(x)`` of
``sin(x)``, what a custom rule keeps) are seen as they are, with the equations that make them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from nexus_jax import flat as flats
from nexus_jax.flat import Flat

_PREFIX = "nexus_jax.value."


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """An equation of the forward half of a differentiated program.

    Attributes:
        eqn: as JAX wrote it; its variables are not those of the program.
        ins, outs: values; below ``len(flat.number)`` the program's own, above it derived ones.
        home: the equation of the program that it belongs to.
        forward: whether the loss needs it; else only the backward pass does.
    """

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    home: int
    forward: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Needs:
    """The forward half of a differentiated program.

    Attributes:
        steps: equation by equation.
        avals: the type of each value.
        residuals: values that the backward pass needs.
        named: values that a name can reach.
    """

    steps: tuple[Step, ...]
    avals: tuple[Any, ...]
    residuals: frozenset[int]
    named: frozenset[int]


def needs_of(flat: Flat, differentiated: Sequence[int], results: Sequence[int] = (0,)) -> Needs:
    """Differentiate a flat program.

    Args:
        differentiated: which of its inputs (constants counted).
        results: which of its results are; the first alone is the loss.
    """
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(_named(flat), ()))

    def forward(*given: Any) -> Any:
        def loss(*whole: Any) -> Any:
            outs = run(*whole)
            return [outs[i] for i in results], [x for i, x in enumerate(outs) if i not in results]

        of = flats.filling(loss, given, differentiated)
        values, backward, aux = jax.vjp(of, *(given[i] for i in differentiated), has_aux=True)
        return [*values, *aux], jax.tree.leaves(backward)

    closed = jax.make_jaxpr(forward)(*flats.avals(flat))
    return _read(flats.flatten(closed), flat)


def _named(flat: Flat) -> Any:
    eqns = []
    for eqn in flat.eqns:
        outs, names = [], []
        for v in eqn.outvars:
            if isinstance(v, jex.DropVar) or not nameable(v.aval):
                outs.append(v)
                continue
            raw = jex.Var(v.aval)
            outs.append(raw)
            names.append(name_equation(raw, v, f"{_PREFIX}{flat.number[v]}", eqn))
        eqns += [eqn.replace(outvars=outs), *names]
    return flat.jaxpr.replace(eqns=eqns)


def nameable(aval: Any) -> bool:
    """Whether a value can bear a name: arrays can, random keys cannot."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and not jax.numpy.issubdtype(dtype, jax.dtypes.extended)


def name_equation(source: Any, target: Any, name: str, like: Any) -> Any:
    """An equation that gives ``source`` a name, as ``target``."""
    template = _template()
    params = {**template.params, "name": name}
    return like.replace(
        primitive=template.primitive, params=params, effects=template.effects, invars=[source], outvars=[target]
    )


@functools.cache
def _template() -> Any:
    [eqn] = jax.make_jaxpr(lambda x: checkpoint_name(x, "x"))(jax.ShapeDtypeStruct((), jax.numpy.float32)).eqns
    return eqn


def _read(forward: Flat, flat: Flat) -> Needs:
    uses = Counter(v for eqn in forward.eqns for v in eqn.invars if not isinstance(v, jex.Literal))
    uses.update(v for v in forward.jaxpr.outvars if not isinstance(v, jex.Literal))
    reader = _Reader(flat, uses)
    extra = len(forward.consts)  # constants that differentiation brought with it
    for v in forward.jaxpr.invars[:extra]:
        reader.fresh(v)
    for n, v in enumerate(forward.jaxpr.invars[extra:]):
        reader.values[v] = n
    for eqn in forward.eqns:
        reader.see(eqn)
    return reader.result(forward.jaxpr.outvars, len(flat.jaxpr.outvars))


class _Reader:
    """Values of a differentiated program, told by their names; the rest numbered on."""

    def __init__(self, flat: Flat, uses: Counter[Any]):
        self.uses = uses
        self.values: dict[Any, int] = {}
        self.avals = [v.aval for v in flat.variables]
        self.homes = {flat.number[v]: i for i, eqn in enumerate(flat.eqns) for v in eqn.outvars}
        self.named: set[int] = set()
        self.steps: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self.home: list[int] = []
        self.open = 0  # steps before this one have a home

    def fresh(self, v: Any) -> int:
        self.values[v] = len(self.avals)
        self.avals.append(v.aval)
        return self.values[v]

    def see(self, eqn: Any) -> None:
        name = eqn.params.get("name")
        if eqn.primitive.name != "name" or not name.startswith(_PREFIX):
            self.steps.append((eqn, tuple(v for v in eqn.invars if not isinstance(v, jex.Literal)), eqn.outvars))
            return
        value = int(name.removeprefix(_PREFIX))
        source = eqn.invars[0]
        self.values[eqn.outvars[0]] = value
        self.named.add(value)
        if isinstance(source, jex.Literal) or source in self.values or self.uses[source] > 1:
            # exp's derivative is its result, as it was before it had a name: keeping the named one does not spare that
            self.steps.append((eqn, eqn.invars, eqn.outvars))
        else:
            self.values[source] = value
        self.home += [self.homes[value]] * (len(self.steps) - len(self.home))

    def result(self, outvars: list[Any], count: int) -> Needs:
        self.home += [max(self.homes.values(), default=0)] * (len(self.steps) - len(self.home))
        found = []
        for (eqn, ins, made), home in zip(self.steps, self.home, strict=True):
            numbered = tuple(self.values[v] if v in self.values else self.fresh(v) for v in made)
            read = tuple(self.values[v] for v in ins if not isinstance(v, jex.Literal))
            found.append((eqn, read, numbered, home))
        outs = [None if isinstance(v, jex.Literal) else self.values[v] for v in outvars]
        residuals = frozenset(v for v in outs[count:] if v is not None)
        wanted, forward = {v for v in outs[:count] if v is not None}, []
        for eqn, ins, made, _ in reversed(found):
            forward.append(bool(eqn.effects) or any(v in wanted for v in made))
            if forward[-1]:
                wanted.update(ins)
        steps = [Step(e, i, o, h, f) for (e, i, o, h), f in zip(found, reversed(forward), strict=True)]
        return Needs(tuple(steps), tuple(self.avals), residuals, frozenset(self.named))
