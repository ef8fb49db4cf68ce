"""The device peak of a training step, from its jaxpr and the rules of a compiler."""

from __future__ import annotations

import dataclasses

from nexus_jax.peak import rules
from nexus_jax.peak.graph import flatten
from nexus_jax.peak.live import Life, life
from nexus_jax.program import Program
from nexus_jax.scopes import module_path
from nexus_jax.targets.compiler import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Live:
    """One value that is alive at the peak."""

    nbytes: int
    path: str
    op: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step will take."""

    device_bytes: int
    temp_bytes: int
    host_bytes: int
    at_peak: tuple[Live, ...]
    peak_path: str


def backend_of(target: Target) -> rules.Backend:
    platform = target.platform
    return rules.TPU if platform == "tpu" else rules.GPU


def predict(program: Program, target: Target) -> Prediction:
    graph = flatten(program.traced.jaxpr)
    backend = backend_of(target)
    size = backend.sizer(graph)
    found = life(graph, backend, size)
    plain = backend.sizer(None)
    arguments = sum(plain(v) for v in graph.inputs if v.users or v in graph.outputs)
    outputs = sum(plain(v) for v in graph.outputs if v is not None)
    return Prediction(
        device_bytes=arguments + outputs + found.temp,
        temp_bytes=found.temp,
        host_bytes=found.host,
        at_peak=tuple(_live(found)),
        peak_path=module_path(found.node.scope) if found.node else "",
    )


def _live(found: Life | None):
    while found is not None:
        for b in found.at_peak:
            node = b.value.node
            yield Live(nbytes=b.size, path=module_path(node.scope) if node else "", op=node.op if node else "argument")
        found = found.inner
