"""Name scopes, of a jaxpr's equations and of compiled instructions: which module, and which part of the step."""

from __future__ import annotations

import re
from typing import Literal

Phase = Literal["forward", "backward", "recompute"]

# Scopes that JAX opens, and that are no module of the user's.
_OF_JAX = {"checkpoint", "rematted_computation", "closed_call", "call_exported", "while", "body", "cond"}
_TRANSFORMED = re.compile(r"\w+\(([^()]*)\)")
_JITTED = re.compile(r"\bp?jit\([^()]*\)")


def module_path(scope: str) -> str:
    """A scope without the transformations, and without a module's name said twice (by a boundary around it).

    Example:
        >>> module_path("jit(step)/transpose(jvp(GPT))/blocks_0/checkpoint/blocks_0/attn")
        'GPT/blocks_0/attn'
    """
    scope = _JITTED.sub("", scope)
    while _TRANSFORMED.search(scope):
        scope = _TRANSFORMED.sub(r"\1", scope)
    parts: list[str] = []
    for part in scope.split("/"):
        # jnp.einsum opens a scope with its subscripts
        if part and "->" not in part and part not in _OF_JAX and parts[-1:] != [part]:
            parts.append(part)
    return "/".join(parts)


def phase(scope: str) -> Phase:
    """Which part of a training step an operation belongs to, by what JAX wrote into its scope.

    Example:
        >>> phase("jit(step)/transpose(jvp(GPT))/blocks_0/checkpoint/rematted_computation/attn")
        'recompute'
        >>> phase("jit(step)/transpose(jvp(GPT))/blocks_0/mlp"), phase("jit(step)/jvp(GPT)/blocks_0/mlp")
        ('backward', 'forward')
    """
    if "rematted_computation" in scope:
        return "recompute"
    return "backward" if "transpose(" in scope else "forward"
