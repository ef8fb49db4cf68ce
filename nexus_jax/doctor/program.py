"""Checks of the step itself: its loops, its boundaries, and the names that policies go by."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from nexus_jax import _compat
from nexus_jax.doctor.case import Case, Checkpoint, Finding, checkpoint_of, name_of, walk
from nexus_jax.policy.rules import Policy
from nexus_jax.report import size
from nexus_jax.scopes import module_path

_OURS = "nexus_jax."  # names that nexus_jax gives; no user wrote them


def scan_of_one(case: Case) -> Iterator[Finding]:
    """Loops of one step, which XLA unrolls."""
    loops = {id(e): e for e, _ in walk(case.forward) if e.primitive.name == "scan" and e.params["length"] == 1}
    if not loops:
        return
    inside = sum(n for n, place in case.to_host if any(_is_one(e) for e in place) and not place.in_loop)
    what = f"{size(inside)} that go to the host in it are no longer tied to its progress" if inside else _UNTIED
    yield Finding(
        check="scan of length one",
        found=f"{_times(len(loops), 'scan')} of length 1: {_places(loops.values())}",
        matters=f"XLA unrolls a loop of one step: {what}",
        write="at least two steps: with groups of layers, fewer layers a group",
    )


_UNTIED = "what a loop does for recomputation and offloading, to keep them in step with it, is lost"


def _is_one(eqn: Any) -> bool:
    return eqn.primitive.name == "scan" and eqn.params["length"] == 1


def nested_remat(case: Case) -> Iterator[Finding]:
    """Boundaries inside boundaries."""
    nested = {id(e): e for e, place in walk(case.forward) if checkpoint_of(e) is not None and place.checkpoints}
    if nested:
        yield Finding(
            check="nested remat",
            found=f"{_times(len(nested), 'jax.checkpoint')} inside another: {_places(nested.values())}",
            matters="the outer one recomputes all that is in it, and the inner one recomputes its part once more: more work, "
            "and nothing saved over the outer one alone but while that is recomputed",
            write="one of the two (nexus_jax keeps the outermost match; remove nn.remat from the model)",
        )


# --- names -----------------------------------------------------------------------------------------------------------


def policy_names(case: Case) -> Iterator[Finding]:
    """Names that a policy goes by and no value in its boundary bears: a mistyped one recomputes everything."""
    wanted: dict[str, bool] = {}
    borne: set[str] = set()
    for checkpoint in case.checkpoints:
        inside = set(_borne(checkpoint.jaxpr))
        borne |= inside
        for name in names_of(checkpoint.policy) or ():
            wanted[name] = wanted.get(name, False) or name in inside
    for name in (n for n, found in wanted.items() if not found and not n.startswith(_OURS)):
        close = difflib.get_close_matches(name, [n for n in borne if not n.startswith(_OURS)], n=1, cutoff=0.5)
        hint = f"{close[0]!r}, which is borne" if close else f"checkpoint_name(x, {name!r}) on a value in the boundary"
        yield Finding(
            check="policy names",
            found=f"a policy goes by the name {name!r}, and no value in its boundaries bears it",
            matters="jax.checkpoint says nothing, and recomputes what the name was to keep",
            write=hint,
            source="https://github.com/AI-Hypercomputer/maxtext/pull/4990",
        )


def unused_names(case: Case) -> Iterator[Finding]:
    """Named values that no policy asks for."""
    used, borne = set(), set()
    for eqn, place in walk(case.forward):
        name = name_of(eqn)
        if name is None or name.startswith(_OURS):
            continue
        borne.add(name)
        asked = [names_of(c.policy) for c in place.checkpoints]
        if any(names is None or name in names for names in asked):
            used.add(name)
    used |= {name for c in case.checkpoints for name in _renamed(c.jaxpr)}
    unused = sorted(borne - used)
    if unused:
        yield Finding(
            check="unused names",
            found=f"{_times(len(unused), 'checkpoint_name')} that no policy asks for: {', '.join(map(repr, unused))}",
            matters="a name alone keeps nothing: outside a jax.checkpoint with a policy that has it, it does nothing",
            write="a policy with these names, as jax.checkpoint_policies.save_only_these_names or name = ... in a policy file",
        )


def unmoved_names(case: Case) -> Iterator[Finding]:
    """Names that are to be offloaded, are borne, and of which nothing goes to the host."""
    wanted = set()
    for checkpoint in case.checkpoints:
        names = names_of(checkpoint.policy, offloaded=True) or frozenset()
        wanted |= names & set(_borne(checkpoint.jaxpr))
    if wanted and case.step is not None and not case.host_bytes:
        yield Finding(
            check="offloaded names",
            found=f"{', '.join(map(repr, sorted(wanted)))} to be offloaded, and nothing goes to the host",
            matters="a boundary keeps what its backward pass reads: not its own output, which the next one takes as its input, "
            "nor what is cheap to have from another kept value",
            write="the name on the input of the scanned block, not on its output",
            source="https://github.com/jax-ml/jax/issues/23869",
        )


def names_of(policy: Any, offloaded: bool = False) -> frozenset[str] | None:
    """The names that a policy of ``jax.checkpoint`` keeps; None where it is not known whether it goes by names.

    JAX's own policies are functions that close over their names. A function that closes over none may ask about any.

    Example:
        >>> import jax
        >>> sorted(names_of(jax.checkpoint_policies.save_only_these_names("q", "k")))
        ['k', 'q']
    """
    if policy is None:
        return frozenset()
    if isinstance(policy, Policy):
        rules = [r for r in policy.residual if r.place == "offload" or (not offloaded and r.place == "save")]
        names = [(r.name,) if isinstance(r.name, str) else r.name or () for r in rules]
        return frozenset(n for several in names for n in several)
    return _compat.names_in_policy(policy, offloaded)


def _borne(jaxpr: Any) -> Iterator[str]:
    return (name for eqn, _ in walk(jaxpr) if (name := name_of(eqn)) is not None)


def _renamed(jaxpr: Any) -> Iterator[str]:
    """Names that nexus_jax has read: it gives such a value a name of its own as well."""
    made: dict[Any, str] = {}
    for eqn, _ in walk(jaxpr):
        name = name_of(eqn)
        if name is None:
            continue
        if name.startswith(_OURS) and eqn.invars[0] in made:
            yield made[eqn.invars[0]]
        made[eqn.outvars[0]] = name


# --- policies that are functions ---------------------------------------------------------------------------------------

_KERNELS = {"pallas_call", "tpu_custom_call", "triton_kernel_call", "ffi_call", "custom_partitioning"}


def unknown_kernels(case: Case) -> Iterator[Finding]:
    """Policies that save matmuls, over kernels that they do not know."""
    found: dict[int, Any] = {}
    for checkpoint in case.checkpoints:
        if not callable(checkpoint.policy):
            continue
        equations = [eqn for eqn, _ in walk(checkpoint.jaxpr)]
        kernels = [e for e in equations if e.primitive.name in _KERNELS and not _keeps(checkpoint, e)]
        matmuls = any(_keeps(checkpoint, e) for e in equations if e.primitive.name == "dot_general")
        if matmuls or names_of(checkpoint.policy) is None:
            found |= {id(e): e for e in kernels}
    if found:
        kinds = sorted({e.primitive.name for e in found.values()})
        yield Finding(
            check="kernels under a policy",
            found=f"{_times(len(found), 'kernel')} ({', '.join(kinds)}) that a policy does not keep: {_places(found.values())}",
            matters="a policy that asks for matmuls does not see those in a kernel: attention runs again in the backward pass",
            write="checkpoint_name on what the kernel returns, and a policy that has the name",
        )


def _keeps(checkpoint: Checkpoint, eqn: Any) -> bool:
    """What the policy says of an equation; a policy that cannot be asked keeps nothing."""
    try:
        said = checkpoint.policy(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)
    except (TypeError, ValueError, LookupError, AttributeError):  # a user's function, which may know few primitives
        return False
    return said is True or "Offloadable" in type(said).__name__ or "Saveable" in str(said)


# --- words -------------------------------------------------------------------------------------------------------------


def _times(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n > 1)}"


def _places(eqns: Iterable[Any]) -> str:
    """The lines that equations come from, and their modules."""
    places = {}
    for eqn in eqns:
        module = module_path(_compat.scope_path(eqn))
        line = _compat.source_line(eqn).partition(" ")[0].rpartition("/")[2]
        places[f"{line} in {module}" if module and line else line or module or "?"] = None
    first = list(places)[:3]
    return ", ".join(first) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
