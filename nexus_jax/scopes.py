"""Name scopes, of a jaxpr's equations and of compiled instructions: which module, and which part of the step."""

from __future__ import annotations

import re
from typing import Literal

Phase = Literal["forward", "backward", "recompute"]

STEP = "nexus_jax_step"  # the function that we compile: no user's

# Scopes that JAX opens, and that are no module of the user's.
_OF_JAX = {"eval_jaxpr", "checkpoint", "rematted_computation", "closed_call", "call_exported", "while", "body", "cond"}
_TRANSFORMED = re.compile(r"\w+\(([^()]*)\)")
_JITTED = re.compile(r"\bp?jit\([^()]*\)")


def module_path(scope: str) -> str:
    """A scope without the transformations, and without a module's name said twice (by a boundary around it).

    Example:
        >>> module_path("jit(step)/transpose(jvp(GPT))/blocks_0/checkpoint/blocks_0/attn")
        'GPT/blocks_0/attn'
        >>> module_path("transpose(jvp(GPT))/h_0/attn/jvp(GPT)/h_0/attn/checkpoint/rematted_computation/attn/q")
        'GPT/h_0/attn/q'
    """
    scope = _JITTED.sub("", scope)
    while _TRANSFORMED.search(scope):
        scope = _TRANSFORMED.sub(r"\1", scope)
    # jnp.einsum opens a scope with its subscripts
    parts = [part for part in scope.split("/") if part and "->" not in part and part not in _OF_JAX]
    return "/".join(_said_once(parts))


def _said_once(parts: list[str]) -> list[str]:
    """Without a run that is said twice in a row: a boundary's name, or the whole path of what a gradient is of."""
    for length in range(len(parts) // 2, 0, -1):
        for start in range(len(parts) - 2 * length + 1):
            if parts[start : start + length] == parts[start + length : start + 2 * length]:
                return _said_once(parts[:start] + parts[start + length :])
    return parts


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
