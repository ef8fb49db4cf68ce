"""A training step as a program: its jaxpr, a name for caches, and the bytes that another process can compile."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax import export
from jax.sharding import NamedSharding
from jax.tree_util import SequenceKey

from nexus_jax import _compat, adapters
from nexus_jax.boundary import split
from nexus_jax.flat import filling, is_floating
from nexus_jax.scopes import STEP
from nexus_jax.targets import cache as caches
from nexus_jax.targets.compiler import Job, Target
from nexus_jax.traced import Traced, argument_names

_DATA = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """``value_and_grad`` of a loss as a function of a flat list of arrays.

    Attributes:
        fun: takes the arrays, returns the loss, the aux output and the gradients as a flat list.
        arrays: what it takes, as ``ShapeDtypeStruct``s with the shardings that were given.
        names: where each is among the arguments of the loss, ``"params/blocks_0/attn/kernel"``, ``"args[1]"``.
    """

    fun: Callable[..., list[Any]]
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...]

    @functools.cached_property
    def traced(self) -> Any:
        """The program traced by JAX; nothing is computed."""
        return jax.jit(self.fun).trace(*self.arrays)

    @functools.cached_property
    def digest(self) -> str:
        """Equal for equal programs, in every process: from the jaxpr, without addresses and source lines."""
        jaxpr = self.traced.jaxpr
        text = re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))
        shardings = [repr(x.sharding) for x in self.arrays]
        constants = [_digest_of(c) for c in jaxpr.consts]
        return hashlib.sha256("\n".join([text, *shardings, *constants]).encode()).hexdigest()

    def parameters(self) -> list[str]:
        """The names of the arrays that are compiled: all but those that nothing depends on."""
        kept = _compat.kept_inputs(self.traced.jaxpr.jaxpr)
        return [name for name, k in zip(self.names, kept, strict=True) if k]

    @functools.cached_property
    def mesh(self) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
        """``(axis names, axis sizes)`` of the mesh that the arrays are sharded over, or None.

        Raises:
            ValueError: they are sharded over different meshes.
        """
        found = {
            (tuple(s.mesh.axis_names), tuple(s.mesh.axis_sizes))
            for s in (x.sharding for x in self.arrays)
            if isinstance(s, NamedSharding) and s.mesh.size > 1
        }
        if len(found) > 1:
            raise ValueError(f"the arguments are sharded over different meshes: {sorted(map(str, found))}.")
        return found.pop() if found else None

    def job(
        self, target: Target, label: str, compiler_options: dict[str, Any] | None = None, texts: bool = False
    ) -> Job:
        """What the compiler is asked.

        Raises:
            ValueError: the program's mesh and the target differ in their number of devices.
        """
        options = tuple(sorted((compiler_options or {}).items()))
        size = int(np.prod(self.mesh[1])) if self.mesh else 1
        if target.sheet is not None and size != target.devices:
            raise ValueError(_mesh_message(target, self.mesh))
        described = target.name if target.sheet is None else target.job()
        device = str(jax.devices()[0].device_kind) if target.sheet is None else ""
        flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
        key = caches.key_of("compile", self.digest, described, device, target.versions(), options, flags)
        return Job(
            key=key,
            target=target,
            label=label,
            serialized=functools.partial(self._serialized, target.platform),
            lowered=lambda: self.traced.lower(),
            mesh=self.mesh,
            texts=texts,
            compiler_options=options,
        )

    def _serialized(self, platform: str) -> bytes:
        exported = _export(self.fun, self.arrays, platform)
        kept = exported.module_kept_var_idx
        if len(kept) < len(self.arrays):  # jax.jit leaves unused arguments out, an exported program does not

            def fun(*given):
                filled = iter(given)
                return self.fun(*(next(filled) if i in kept else _any(x) for i, x in enumerate(self.arrays)))

            fun.__name__ = STEP
            exported = _export(fun, tuple(self.arrays[i] for i in kept), platform)
        return bytes(exported.serialize())


def _any(x: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this type, to stand for an argument that is not used."""
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        keys = (jax.random.key(0, impl=name) for name in ("threefry2x32", "rbg", "unsafe_rbg"))
        return jax.numpy.broadcast_to(next(key for key in keys if key.dtype == x.dtype), x.shape)
    return jax.numpy.zeros(x.shape, x.dtype)


def _export(fun: Callable[..., Any], arrays: tuple[Any, ...], platform: str) -> export.Exported:
    """The program lowered for a platform that need not be here, whatever custom calls it makes.

    The program is compiled at once by the versions that wrote it, so no custom call can have changed in between.
    """
    allowed: list[export.DisabledSafetyCheck] = []
    while True:
        try:
            return export.export(jax.jit(fun), platforms=[platform], disabled_checks=allowed)(*arrays)
        except (NotImplementedError, ValueError) as error:
            message = str(error)
            if "callback" in message or "the specified backend" in message:
                raise ValueError(
                    "the step calls back into Python (jax.debug.print, pure_callback, io_callback): it cannot be compiled "
                    "for another device. Leave the callback out of the function to measure."
                ) from error
            new = [export.DisabledSafetyCheck.custom_call(n) for n in re.findall(r"custom_call @([\w.$]+)", message)]
            new = [check for check in dict.fromkeys(new) if check not in allowed]
            if not new:
                raise
            allowed += new


def _digest_of(constant: Any) -> str:
    if isinstance(constant, jax.Array) and not isinstance(constant, jax.core.Tracer):
        if jax.numpy.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        constant = np.asarray(constant)
    if not isinstance(constant, np.ndarray):
        return repr(type(constant))
    return f"{constant.dtype}{constant.shape}{hashlib.sha256(constant.tobytes()).hexdigest()}"


# --- from a loss to its step ---------------------------------------------------------------------------------------


def step_of(
    fn: Callable[..., Any], args: tuple[Any, ...], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Program:
    """``jax.value_and_grad(fn, argnums, has_aux)`` of these arguments as a program.

    An nnx module among the arguments stands for its state: its ``Param``s are differentiated, what else the call
    changes in it (statistics, random streams) is returned, as ``nnx.value_and_grad`` under ``nnx.jit`` does.

    Args:
        fn: returns a scalar, or ``(scalar, aux)``.
        args: pytrees of arrays and ``ShapeDtypeStruct``s, nnx modules; flags and the like are constants.
        argnums: which of them to differentiate.

    Raises:
        TypeError: integers among what is differentiated; nothing to differentiate; a result that is no scalar.
        ValueError: ``argnums`` names an argument that is not there, or one twice.
    """
    wanted = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not all(isinstance(n, int) for n in wanted):
        raise TypeError(f"argnums={argnums!r}: write the number of an argument, or several.")
    for n in wanted:
        if not -len(args) <= n < len(args):
            raise ValueError(f"argnums={argnums!r}, but the function has {len(args)} arguments.")
    wanted = tuple(n % len(args) for n in wanted)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"argnums={argnums!r} names an argument twice.")
    opened = [adapters.nnx.state_of(x) for x in args]
    arrays: list[Any] = []
    rebuilds, counts, differentiated = [], [], []
    for n, (state, is_param) in enumerate(opened):
        found, rebuild = split(state, _DATA)
        rebuilds.append(rebuild)
        counts.append(len(found))
        if n in wanted:
            differentiated += _differentiated(n, found, is_param, len(arrays))
        arrays += found
    if not differentiated:
        raise TypeError(f"argnums={argnums!r}: that argument holds no array, so there is nothing to differentiate.")

    def fun(*given: Any) -> list[Any]:
        def loss(*whole):
            pieces = iter(whole)
            states = [r([next(pieces) for _ in range(c)]) for r, c in zip(rebuilds, counts, strict=True)]
            models = [adapters.nnx.opened_state(x, s) for x, s in zip(args, states, strict=True)]
            out = fn(*models)
            value, aux = _value_and_aux(fn, out, has_aux)
            changed = [adapters.nnx.changed_state(x, m) for x, m in zip(args, models, strict=True)]
            return value, split((aux, changed))[0]

        (value, rest), grads = jax.value_and_grad(
            filling(loss, given, differentiated), argnums=tuple(range(len(differentiated))), has_aux=True
        )(*(given[i] for i in differentiated))
        return [value, *rest, *grads]

    fun.__name__ = STEP
    paths = [(SequenceKey(n), *path) for n, rebuild in enumerate(rebuilds) for path in rebuild.paths()]
    return Program(fun, tuple(_shape_of(x) for x in arrays), tuple(argument_names(paths)))


def check_loss(fn: Callable[..., Any], args: Sequence[Any]) -> None:
    """Trace a loss forward, and raise a ``TypeError`` unless it is a scalar and the first argument has a gradient."""
    state, is_param = adapters.nnx.state_of(args[0])
    _differentiated(0, split(state, _DATA)[0], is_param, 0)
    traced = Traced(fn, args, {})
    jax.eval_shape(lambda *xs: _value_and_aux(fn, traced.fun(traced.rebuild(list(xs))), False)[0], *traced.arrays)


def _differentiated(n: int, found: list[Any], is_param: list[bool] | None, start: int) -> list[int]:
    if is_param is not None:
        return [start + i for i, (x, p) in enumerate(zip(found, is_param, strict=True)) if p and is_floating(x)]
    for x in found:
        if not is_floating(x):
            raise TypeError(
                f"argument {n} holds an array of {x.dtype}, which has no gradient: "
                "put it into another argument, or choose argnums without it."
            )
    return [start + i for i in range(len(found))]


def called(fn: Callable[..., Any]) -> str:
    """What a function is called in messages: ``"loss (train.py:12)"``."""
    name = getattr(fn, "__name__", type(fn).__name__)
    code = getattr(fn, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code else name


def _value_and_aux(fn: Callable[..., Any], out: Any, has_aux: bool) -> tuple[Any, Any]:
    name = called(fn)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        found = jax.typeof(out) if isinstance(out, jax.Array) else type(out).__name__
        raise TypeError(f"has_aux=True: {name} must return (loss, aux), and returned {found}.")
    value: Any = out[0] if has_aux else out
    aux = out[1] if has_aux else None
    if not hasattr(value, "shape") and not isinstance(value, float):
        hint = " Return the loss alone, or write has_aux=True." if isinstance(value, tuple) else ""
        raise TypeError(f"{name} must return a scalar loss, and returned {type(value).__name__}.{hint}")
    array = jax.numpy.asarray(value)
    if array.shape != () or not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        kind = f"{array.dtype}{list(array.shape)}"
        raise TypeError(f"{name} must return a scalar loss of floating point, and returned {kind}.")
    return value, aux


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    spread = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if spread else None)


def _mesh_message(target: Target, mesh: Any) -> str:
    if mesh is None:
        return (
            f"target={target.name!r} has {target.devices} devices and no argument says how it is spread over them: give "
            f"ShapeDtypeStructs a sharding over nexus_jax.target_mesh({target.name!r}, data={target.devices})."
        )
    size = int(np.prod(mesh[1]))
    named = dict(zip(*mesh, strict=True))
    return f"the arguments are sharded over {size} devices ({named}), and target={target.name!r} has {target.devices}."
