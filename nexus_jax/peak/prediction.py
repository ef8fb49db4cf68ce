"""The device peak of a training step, from its jaxpr and the rules of a compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nexus_jax import report
from nexus_jax.peak import rules
from nexus_jax.peak.graph import flatten
from nexus_jax.peak.live import Life, Sizes, life
from nexus_jax.program import Program, step_of
from nexus_jax.scopes import module_path
from nexus_jax.targets.compiler import Target, find_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Live:
    """One value that is alive at the peak: its bytes, the module that made it (``"GPT/blocks_0/attn"``), and the primitive."""

    nbytes: int
    path: str
    op: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step will take on one target. Prints as a table.

    Attributes:
        target: its name.
        device_bytes: arguments + outputs + temporaries in device memory, as :func:`nexus_jax.measure` gives them.
        argument_bytes, output_bytes, temp_bytes: the parts.
        host_bytes: temporaries in host memory.
        at_peak: the temporaries alive at the peak, largest first; inside a loop, those of its body after those around it.
        peak_path: the module that runs at the peak.
    """

    target: str
    device_bytes: int
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    host_bytes: int
    at_peak: tuple[Live, ...]
    peak_path: str

    def __str__(self) -> str:
        rows = [
            ("device bytes", report.size(self.device_bytes)),
            ("  arguments", report.size(self.argument_bytes)),
            ("  outputs", report.size(self.output_bytes)),
            ("  temporaries", report.size(self.temp_bytes)),
            ("host bytes", report.size(self.host_bytes)),
            *((f"at the peak: {x.path or 'outside modules'} {x.op}", report.size(x.nbytes)) for x in self.at_peak[:10]),
        ]
        return report.table(f"value_and_grad on {self.target}, predicted", ("", ""), rows)


def predict(program: Program, target: Target) -> Prediction:
    """Simulate what the target's compiler does with a program's memory; nothing is compiled.

    It knows what compilers fuse and what they write, in which order they run it and where they put it. It takes
    milliseconds per layer, and grows as their number does. See ``benchmarks/peak_table.py`` for how far it is off: it was
    held against v5e and h200; other TPUs are taken to have the VMEM of a v5e, which matters where a step needs little
    more than that (112 MiB).

    Args:
        program: a step, from :func:`nexus_jax.program.step_of`.
        target: a TPU or an NVIDIA GPU, one device.

    Raises:
        ValueError: a target whose compiler the model does not know, or a program that is spread over several devices.
    """
    backend = backend_of(target)
    if program.mesh is not None:
        raise ValueError(
            f"the step is spread over {program.mesh}: the peak is predicted for one device; measure it instead."
        )
    graph = flatten(program.traced.jaxpr)
    found = life(graph, backend, Sizes(backend.sizer(graph), backend.sizer(graph, halved=False)))
    size = backend.sizer()
    read = {v for v in graph.inputs if v.users or v in set(graph.outputs)}
    arguments = sum(size(v) for v in graph.inputs if v in read and not v.host)
    outputs = sum(size(v) for v in graph.outputs if v is not None and not v.host)
    return Prediction(
        target=target.name,
        device_bytes=arguments + outputs + found.temp,
        argument_bytes=arguments,
        output_bytes=outputs,
        temp_bytes=found.temp,
        host_bytes=found.host,
        at_peak=tuple(_alive(found)),
        peak_path=module_path(_innermost(found).scope) if found.node is not None else "",
    )


def backend_of(target: Target) -> rules.Backend:
    """The rules of a target's compiler.

    Raises:
        ValueError: there are none for it.
    """
    known = {"tpu": rules.TPU, "cuda": rules.GPU}
    if target.platform not in known:
        raise ValueError(
            f"target={target.name!r} is a {target.platform}, whose compiler the model of the peak does not know: "
            'write a TPU or a GPU (target="v5e", target="h200"), or measure the step instead.'
        )
    return known[target.platform]


def predict_peak(
    fn: Callable[..., Any],
    *args: Any,
    target: str | Target | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Prediction:
    """The device peak of ``jax.value_and_grad(fn, argnums, has_aux)`` on a target, without a compile.

    Args:
        fn: a loss: returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        args: what to call it with: pytrees of arrays or ``ShapeDtypeStruct``s, nnx modules, flags.
        target: ``"v5e"``, ``"h200"``, ...; None is the local device, if it is a TPU or a GPU.
        argnums: which arguments to differentiate.

    Returns:
        A :class:`Prediction`.

    Raises:
        ValueError: an unknown target, one that the model does not know, or arguments sharded over several devices.
        TypeError: integers among what is differentiated, a loss that is no scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
        >>> w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
        >>> found = predict_peak(lambda w, x: jnp.sum(jnp.sin(x @ w)), w, x, target="h200")
        >>> found.temp_bytes // 2**20  # 16 of x @ w, whose place its gradient takes; 8 of partial sums of w's gradient
        24
    """
    program = step_of(fn, args, argnums if isinstance(argnums, int) else tuple(argnums), has_aux)
    return predict(program, find_target(target))


def _innermost(found: Life) -> Any:
    while found.inner is not None and found.inner.node is not None:
        found = found.inner
    return found.node


def _alive(found: Life | None) -> Iterator[Live]:
    while found is not None:
        for b in found.at_peak:
            node = b.value.node
            yield Live(nbytes=b.size, path=module_path(node.scope) if node else "", op=node.op if node else "argument")
        found = found.inner
