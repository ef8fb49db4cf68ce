"""Every touch of private JAX or Flax, each with a test in tests/test_compat.py that fails loudly when it moves."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import pkgutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.core.lift
import flax.linen as nn
import flax.linen.module as linen_module
import flax.linen.transforms as linen_transforms
import jax
import jax.ad_checkpoint
import numpy as np
from flax import nnx
from flax.nnx import extract, graphlib
from flax.nnx.transforms import general
from jax._src import (
    api,  # private: `jax.grad` calls `vjp` by its name in here
    hardware_utils,  # private: what JAX itself asks before it warns of an accelerator that it does not use
    source_info_util,  # private: no public way from an equation to its line and scope
)
from jax._src.interpreters import partial_eval
from jax.extend import core as jex
from jax.extend.core import primitives

OFFLOADABLE = jax.ad_checkpoint.Offloadable(src="device", dst="pinned_host")


def require_offload_policies() -> None:
    """Refuse ``jax_remat3`` on a JAX whose new remat has no offloading."""
    if getattr(jax.config, "jax_remat3", False) and jax.__version_info__ < (0, 11):
        raise ValueError(
            f"jax {jax.__version__} cannot offload by policy under jax_remat3: "
            "unset that flag (jax.config.update('jax_remat3', False)) or use a policy without place = \"offload\"."
        )


def output_aval(prim: Any, avals: tuple[Any, ...], params: dict[str, Any]) -> Any:
    """The type of the (first) output of a primitive, as a checkpoint policy is shown it: inputs and parameters."""
    if prim.name == "name":
        return avals[0]
    out = prim.abstract_eval(*avals, **params)[0]
    return out[0] if isinstance(out, list | tuple) else out


def without_constvars(jaxpr: Any) -> Any:
    """The jaxpr with its constants as its first arguments."""
    return partial_eval.convert_constvars_jaxpr(jaxpr)


def kept_inputs(jaxpr: Any) -> list[bool]:
    """Which arguments ``jax.jit`` compiles: it leaves out what no result depends on."""
    return partial_eval.dce_jaxpr_consts(jaxpr, [True] * len(jaxpr.outvars))[2]


def varying_axes(aval: Any) -> tuple[str, ...]:
    """The axes of a mesh over which a value differs, inside ``shard_map``."""
    kind = getattr(aval, "manual_axis_type", None)  # jax 0.12; before, the axes themselves
    return tuple(kind.varying if kind is not None else getattr(aval, "vma", ()))


def bind_checkpoint(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], policy: Callable[..., Any]) -> list[Any]:
    """``jax.checkpoint`` of a program that is traced already: a second trace would double the time of the first.

    Args:
        jaxpr: without constants of its own; its first arguments are ``consts``.
    """
    params = _checkpoint_params(policy, getattr(jax.config, "jax_remat3", False))
    if params is None:  # jax_remat3 has another primitive, and takes a function
        run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
        return jax.checkpoint(run, policy=policy)(*consts, *args)
    return primitives.remat_p.bind(*consts, *args, **{**params, "jaxpr": jaxpr})


@functools.lru_cache(maxsize=64)
def _checkpoint_params(policy: Callable[..., Any], remat3: bool) -> dict[str, Any] | None:
    """What ``jax.checkpoint`` gives its primitive beside the program, in this JAX and under its flags."""
    del remat3  # part of the key
    [eqn] = jax.make_jaxpr(jax.checkpoint(lambda x: x, policy=policy))(jax.ShapeDtypeStruct((), np.float32)).eqns
    return eqn.params if eqn.primitive is primitives.remat_p else None


def names_in_policy(policy: Any, offloaded: bool = False) -> frozenset[str] | None:
    """The names that one of JAX's own checkpoint policies keeps (or offloads); None for anybody else's function.

    They are functions that close over their names; in jax 0.10 dataclasses that hold them.
    """
    if not str(getattr(policy, "__module__", "") or type(policy).__module__).startswith("jax."):
        return None
    held = inspect.getclosurevars(policy).nonlocals if inspect.isfunction(policy) else vars(policy)
    names: set[str] = set()
    for key, value in held.items():
        if key in ("policy_1", "policy_2"):
            inner = names_in_policy(value, offloaded)
            if inner is None:
                return None
            names |= inner
        elif key == "names_not_to_save" or type(policy).__name__ == "SaveAnyNamesButThese":  # any name but these
            return None
        elif isinstance(value, set | frozenset) and (not offloaded or "offload" in key):
            names |= value
    return frozenset(names)


@contextlib.contextmanager
def vjp_through(around: Callable[..., Any]) -> Iterator[None]:
    """While this is open, ``jax.vjp(...)`` is ``around(vjp, ...)``, also where ``jax.grad`` and its kin call it.

    It is so in every thread: ``around`` must do nothing where nothing is asked for.
    """
    with _HOOKS_LOCK:
        _HOOKS.append(around)
        if len(_HOOKS) == 1:
            jax.vjp = api.vjp = functools.wraps(_VJP)(_hooked_vjp)
    try:
        yield
    finally:
        with _HOOKS_LOCK:
            _HOOKS.remove(around)
            if not _HOOKS:
                jax.vjp = api.vjp = _VJP


_VJP = api.vjp
_HOOKS: list[Callable[..., Any]] = []
_HOOKS_LOCK = threading.Lock()


def _hooked_vjp(*args: Any, **kwargs: Any) -> Any:
    hooks = _HOOKS[-1:]  # all of them are one function: it may be gone when another thread has left
    return hooks[0](_VJP, *args, **kwargs) if hooks else _VJP(*args, **kwargs)


def jit_options(fn: Any) -> dict[str, str]:
    """The ``compiler_options`` that a function was jitted with; ``jax.jit`` takes such a function at the top only."""
    given = getattr(getattr(fn, "_jit_info", None), "compiler_options_kvs", ())
    return {key: str(value) for key, value in given}


# Equations that run a body once per call or step, with the body's outputs as theirs.
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "scan"}
CALLS |= {"custom_jvp_call", "custom_vmap_call"}


# --- equations ---------------------------------------------------------------------------------------------------


def scope_path(eqn: Any) -> str:
    """The ``jax.named_scope`` path of an equation, transformations removed: ``"GPT/blocks_0/attn"``."""
    return str(eqn.source_info.name_stack)


_LIBRARIES = ("/flax/", "/nexus_jax/", "/jax/", "/jaxlib/", "/contextlib.py", "/functools.py", "/threading.py")


def source_line(eqn: Any) -> str:
    """``file.py:line (function)`` of the innermost frame that is the user's, or the innermost at all."""
    traceback = eqn.source_info.traceback
    frames = list(source_info_util.user_frames(traceback)) if traceback is not None else []
    own = [f for f in frames if not any(part in f.file_name for part in _LIBRARIES)]
    frame = next(iter(own or frames), None)
    return f"{frame.file_name}:{frame.start_line} ({frame.function_name})" if frame else ""


# --- linen -------------------------------------------------------------------------------------------------------

LINEN_CALL = "_call_wrapped_method"  # what every method of a linen module is run by


def lifted_kind(cls: type) -> str | None:
    """``"Scan"``, ``"Jit"``, ... if ``nn.scan``, ``nn.jit``, ... made this class from another one, else None."""
    if cls.__module__ != linen_transforms.__name__ or len(cls.__bases__) != 1:
        return None
    return cls.__name__.removesuffix(cls.__bases__[0].__name__)


def lift_linen(
    run: Callable[..., Any], method: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, name: str = "remat"
) -> Any:
    """Call an unbound ``method`` of a bound ``module`` as ``run(pure, variables, (rngs, args, kwargs))``.

    ``pure`` takes the same two trees; variables, random streams and mutable collections go in and come out as in
    ``nn.remat``, whose machinery this is. The scope's debug path says ``name(...)`` inside.
    """

    def lift(core_fn):
        def inner(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
            def pure(variables, rest):
                rngs, args, kwargs = rest
                scope = scope_fn(variables, rngs)
                out = core_fn(scope, *args, **kwargs)
                return out, repack_fn(scope)

            return run(pure, variables, (rngs, args, kwargs))

        return flax.core.lift.pack(inner, (True,), (True,), (True,), name=name, enable_kwargs=True)

    return linen_transforms.decorator_lift_transform(lift, method)(module, *args, **kwargs)


@contextlib.contextmanager
def captured_once(module: nn.Module, method_name: str) -> Iterator[None]:
    """Keep ``capture_intermediates`` from sowing a method's result twice, inside the boundary and outside it."""
    stack = linen_module._context.capture_stack
    outer = stack[-1] if stack else None
    if not outer:
        yield
        return
    path = module.path
    stack.append(lambda mdl, name: not (mdl.path == path and name == method_name) and outer(mdl, name))
    try:
        yield
    finally:
        stack.pop()


# --- nnx ---------------------------------------------------------------------------------------------------------


def lift_nnx(run: Callable[..., Any], fun: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    """Call ``fun(module, *args, **kwargs)`` as ``run(pure, state, rest)``, in nnx's graph or tree mode."""

    if not all(v._can_update for _, v in _variables(module)):
        return _lift_closed_over(run, fun, module, args, kwargs)

    graph = graphlib.set_graph_mode.current_value()
    graph_updates = graphlib.set_graph_updates.current_value()
    positional = _positional(fun)
    if graph and graph_updates:
        return general.split_inputs(lambda *xs: run(_merging(fun), *xs), ctxtag="nexus_jax")(module, (args, kwargs))

    def functional(module, rest):
        inputs = jax.tree.map(lambda x: x, (module, rest))  # copies, so that only our updates reach the caller
        current, snapshot = extract.snapshot(extract.labeled(inputs=inputs))
        if graph:
            inputs = extract.from_tree2(inputs)
        out = positional(*inputs)
        return (extract.to_tree2(out) if graph else out), extract.get_updates(current, snapshot)

    inputs = (module, (args, kwargs))
    if graph:
        inputs = extract.to_tree2(inputs)
    variables = extract.check_no_aliases("remat", inputs=inputs)
    out, updates = run(functional, *inputs)
    extract.apply_updates(variables, updates)
    return extract.from_tree2(out) if graph else out


@functools.lru_cache(maxsize=1024)
def _positional(fun: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, rest: fun(module, *rest[0], **rest[1])


@functools.lru_cache(maxsize=1024)
def _merging(fun: Callable[..., Any]) -> Callable[..., Any]:
    """One function for one ``fun``, so that JAX traces equal layers once."""
    merging: Any = general.merge_inputs(_positional(fun), ctxtag="nexus_jax")
    merging.traced_once = True
    return merging


def _variables(module: Any) -> list[tuple[Any, nnx.Variable]]:
    return [(path, v) for path, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)]


def _lift_closed_over(run: Callable[..., Any], fun: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    """As :func:`lift_nnx`, for a module from outside the trace that is open now.

    nnx's transforms write every Variable back and refuse to write these. So a copy goes through, and what the call
    changed is written back: nothing, in a call that the plain module would allow.
    """
    copy = nnx.clone(module)
    changed: set[Any] = set()

    def watched(module, *args, **kwargs):
        before = {path: v.get_raw_value() for path, v in _variables(module)}
        out = fun(module, *args, **kwargs)
        changed.update(path for path, v in _variables(module) if v.get_raw_value() is not before.get(path))
        return out

    out = lift_nnx(run, watched, copy, args, kwargs)
    now = dict(_variables(copy))
    for path, variable in _variables(module):
        if path in changed:
            variable.set_value(now[path].get_value())
    return out


# --- compilers without devices -----------------------------------------------------------------------------------


# What libtpu needs to be told where there is no TPU: else it asks the network, stalls, and takes a lock.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_devices(topology: str, chip_config: str = "") -> list[Any]:
    """The devices of a TPU topology (``"v5e:2x2"``), described by libtpu without a TPU.

    Args:
        chip_config: how libtpu shall use the cores of a chip (``"megacore"``), if not by its default.
    """
    from jax.experimental import topologies

    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not has_compiler("tpu"):
        raise RuntimeError(f"no TPU compiler here: {install_line('tpu')}.")
    options: dict[str, Any] = {"chip_config_name": chip_config} if chip_config else {}
    if set(topology.rpartition(":")[2].split("x")) == {"1"}:  # a host of one chip, where libtpu expects four
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


def gpu_devices(target_config: str, count: int = 1) -> list[Any]:
    """The devices of one process with NVIDIA GPUs, described by the CUDA plugin without a GPU or a driver."""
    # JAX's own plugin discovery insists on a GPU's libraries.
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    if not has_compiler("gpu"):
        raise RuntimeError(f"no GPU compiler here: {install_line('gpu')}.")
    found: Any = importlib.util.find_spec(_PLUGIN)
    [library] = pathlib.Path(next(iter(found.submodule_search_locations))).glob("xla_cuda_plugin.so")
    if not xla_client.pjrt_plugin_loaded("cuda"):
        xla_client.load_pjrt_plugin_dynamically("cuda", str(library))
    if not xla_client.pjrt_plugin_initialized("cuda"):
        xla_client.initialize_pjrt_plugin("cuda")
    options = {"target_config": target_config, "topology": f"1x1x{count}"}
    make = xla_client._xla.get_default_c_api_topology  # pyright: ignore[reportPrivateImportUsage]
    return list(make("cuda", f"1x1x{count}", options)._make_compile_only_devices())


_PLUGIN = "jax_plugins.xla_cuda13"


def has_compiler(kind: str) -> bool:
    """Whether the compiler of a kind of device (``"tpu"``, ``"gpu"``) is installed."""
    try:
        found = importlib.util.find_spec("libtpu" if kind == "tpu" else _PLUGIN)
    except ModuleNotFoundError:
        return False
    return found is not None and (kind == "tpu" or bool(found.submodule_search_locations))


def no_accelerator() -> bool:
    """Whether JAX would look for accelerators here in vain: only plugins of TPUs and NVIDIA GPUs, and none of those.

    It would say so at length: the compilers of ``[tpu]`` and ``[gpu]`` are plugins of JAX too.
    """
    plugins = {name for _, name, _ in pkgutil.iter_modules(_plugin_folders())}
    plugins |= {e.value.rpartition(".")[2] for e in importlib.metadata.entry_points(group="jax_plugins")}
    others = any(not name.startswith("xla_cuda") for name in plugins)
    tpus, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    return not (others or tpus or hardware_utils.has_visible_nvidia_gpu())


def _plugin_folders() -> list[str]:
    found = importlib.util.find_spec("jax_plugins")
    return list(found.submodule_search_locations or ()) if found else []


PLUGIN_LOGGER = "jax._src.xla_bridge"  # what says that a plugin does not start, with a traceback


def install_line(kind: str) -> str:
    """What to run where that compiler is missing."""
    return f'pip install "nexus-jax[{kind}]"'
