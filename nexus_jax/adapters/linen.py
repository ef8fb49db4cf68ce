"""Linen: find the modules of a model as it is traced, and open it at a boundary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from nexus_jax import _compat, ambient
from nexus_jax.adapters.classes import Settings, base_of, settings_of, transformed
from nexus_jax.boundary import checkpointed, planned, split
from nexus_jax.policy.rules import Policy
from nexus_jax.policy.select import ModuleNode, Path, Selection, check_selection, select

# Part of the key of every jit cache: a warm cache must not hide (or leak) what is decided while a model is traced.
_TRACING = jax.make_user_context(None)
_ACTIVE = threading.local()

_SINGLE_OPS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Embed, nn.Dropout)


# --- what a linen module is ----------------------------------------------------------------------------------------


def accepts(model: Any) -> bool:
    return isinstance(model, nn.Module) or is_class(model)


def is_class(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, nn.Module)


def type_of(module: nn.Module) -> type:
    """The class as the user wrote it: without ours, and without those of ``nn.scan``, ``nn.jit``, ..."""
    cls = base_of(type(module))
    while _compat.lifted_kind(cls):
        cls = base_of(cls.__bases__[0])
    return cls


def count_params(module: nn.Module) -> int | None:
    """Number of parameters, or None for an unbound module."""
    return None if module.scope is None else sum(math.prod(shape) for _, shape, _ in _params(module))


def is_initializing(module: Any) -> bool:
    """Whether this is a linen module in the middle of its initialisation, when there is nothing to save."""
    return isinstance(module, nn.Module) and module.scope is not None and module.is_initializing()


def index_of(module: nn.Module) -> int | None:
    """3 for a module called ``blocks_3``."""
    tail = (module.name or "").rpartition("_")[2]
    return int(tail) if tail.isdigit() else None


def _params(module: nn.Module) -> tuple:
    leaves = jax.tree_util.tree_leaves_with_path(module.variables.get("params", {}))
    return tuple((jax.tree_util.keystr(path), tuple(x.shape), str(x.dtype)) for path, x in leaves)


def is_single_op(module: nn.Module) -> bool:
    """Whether a boundary around the (bound) module would free nothing: its only residuals are its inputs."""
    return module.scope is not None and type_of(module) in _SINGLE_OPS


# --- the transform -------------------------------------------------------------------------------------------------


def transform(model: Any, **changes: Any) -> Any:
    """A linen class or a copy of a linen instance, with these settings changed."""
    if is_class(model):
        return _class(model, **changes)
    if model.scope is not None:
        raise ValueError(
            f"{type(model).__name__} is bound: transform the unbound module, or decorate its class "
            "(a submodule made inside setup() or a compact method takes the policy of the model around it)."
        )
    new = model.clone()
    object.__setattr__(new, "__class__", _class(type(model), **changes))
    return new


def _class(cls: type, **changes: Any) -> type:
    return transformed(base_of(cls), dataclasses.replace(settings_of(cls), **changes), _members)


def settings(model: Any) -> Settings:
    return settings_of(model if isinstance(model, type) else type(model))


def _members(base: type) -> dict[str, Any]:
    """Every module method of ``base``, entering the policy and the offloader first."""
    members = {}
    for cls in reversed(base.__mro__):
        if not issubclass(cls, nn.Module) or cls is nn.Module:
            continue
        for name, value in cls.__dict__.items():
            if name != "setup" and hasattr(value, "method_handler_wrapped"):
                members[name] = _entering(name, getattr(base, name))
    members[_compat.LINEN_CALL] = _reaching(getattr(base, _compat.LINEN_CALL))
    return members


def _reaching(run: Callable[..., Any]) -> Callable[..., Any]:
    """Where Flax runs any method: also one of the plain class, as in ``apply(..., method=Model.encode)``."""

    @nn.nowrap
    def reach(self, fun, args, kwargs):
        name = getattr(fun, "__name__", "")
        if name == "setup":
            return run(self, fun, args, kwargs)
        return _entering(name, lambda self, *args, **kwargs: run(self, fun, args, kwargs))(self, *args, **kwargs)

    return reach


def _entering(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def enter(self, *args, **kwargs):
        given = _nearest_settings(type(self))
        if self.scope is None or _is_open(self):
            return method(self, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            if given.offloader is not None and not ambient.reaches(given.offloader):
                stack.enter_context(given.offloader.in_force())
            if given.policy is None:
                return method(self, *args, **kwargs)
            if given.policy.whole is not None and not (self.is_initializing() or in_remat(self)):
                stack.enter_context(_noted(_Open(self, None)))
                stack.enter_context(_compat.captured_once(self, name))
                return _compat.lift_linen(planned(given.policy.whole, type(self)), method, self, args, kwargs)
            stack.enter_context(_opened(self, name, args, kwargs, given.policy))
            return method(self, *args, **kwargs)

    return enter


def _nearest_settings(cls: type) -> Settings:
    return next((settings_of(c) for c in cls.__mro__ if settings_of(c) != Settings()), Settings())


# --- tracing a transformed model -----------------------------------------------------------------------------------


class _Plan:
    """What is known of one model under one policy: its modules so far, and the boundaries among them."""

    numbers = itertools.count()

    def __init__(self, policy: Policy, nodes: dict[Path, ModuleNode]):
        self.policy = policy
        self.nodes = nodes
        self.number = next(self.numbers)  # keeps jit caches of different plans apart
        self.selection = select(policy, nodes.values())
        check_selection(policy, self.selection, nodes.values())

    def add(self, node: ModuleNode) -> None:
        """A module that the look-ahead did not meet (one that only some flags call)."""
        if node.path not in self.nodes:
            self.nodes[node.path] = node
            self.selection = select(self.policy, self.nodes.values())

    def inside(self, path: Path) -> Any:
        """What of the selection matters inside ``path``, for the key of jit caches."""
        return frozenset(p[len(path) :] for p in self.selection.boundaries if p[: len(path)] == path)


_PLANS: dict[Any, _Plan] = {}
_LATEST: weakref.WeakKeyDictionary[type, _Plan] = weakref.WeakKeyDictionary()


def selection_of(model: Any) -> Selection | None:
    """The boundaries that the model's class was last traced with, or None before its first trace."""
    plan = _LATEST.get(model if isinstance(model, type) else type(model))
    return plan.selection if plan else None


def _key(root: nn.Module, policy: Policy) -> Any:
    fields = [
        (f.name, getattr(root, f.name, None)) for f in dataclasses.fields(root) if f.name not in ("parent", "name")
    ]
    key = (type(root), policy, tuple(fields))
    try:
        hash(key)
    except TypeError:
        return (type(root), policy, repr(fields))
    return key


class _Open:
    """A root whose call is being traced: under its plan, or being looked at."""

    def __init__(self, root: nn.Module, plan: _Plan | None):
        self.prefix = root.path
        self.cls = type(root)
        self.plan = plan
        self.seen: dict[Path, ModuleNode | None] = {}

    def found(self) -> dict[Path, ModuleNode]:
        """The modules that were met."""
        return {path: node for path, node in self.seen.items() if node is not None}

    def is_top(self) -> bool:
        return bool(_stack()) and _stack()[-1] is self

    def intercept(self, next_fun, args, kwargs, context):
        module = context.module
        path = tuple(module.path[len(self.prefix) :])
        if context.method_name != "__call__" or not path or not self.is_top():
            return next_fun(*args, **kwargs)
        act = self._look if self.plan is None else self._act
        return act(module, path, next_fun, args, kwargs, context)

    def _look(self, module, path, next_fun, args, kwargs, context):
        del context
        if path in self.seen or _compat.lifted_kind(type(module)) in ("Scan", "Checkpoint", "Remat_scan"):
            return next_fun(*args, **kwargs)
        self.seen[path] = None
        out = next_fun(*args, **kwargs)
        children = any(p[: len(path)] == path and p != path for p in self.seen)
        self.seen[path] = self._node(module, path, children)
        return out

    def _node(self, module: nn.Module, path: Path, children: bool) -> ModuleNode:
        cls = type_of(module)
        params = _params(module)
        debug_path = module.scope.debug_path
        policy = self.plan.policy if self.plan else settings_policy(self.cls)
        return ModuleNode(
            path=path,
            type=cls.__name__,
            params=params,
            size=sum(math.prod(shape) for _, shape, _ in params),
            single_op=not children and cls in _SINGLE_OPS,
            leaf_layer=not children and cls.__module__.startswith("flax."),
            scanned=debug_path[-1].startswith("scan("),
            remat=any("remat(" in part for part in debug_path),
            where=ask_where(policy, module, "/".join(path)),
        )

    def _act(self, module, path, next_fun, args, kwargs, context):
        plan = self.plan
        kind = _compat.lifted_kind(type(module))
        if kind in ("Scan", "Checkpoint", "Remat_scan") or in_remat(module):
            return next_fun(*args, **kwargs)
        if path not in plan.nodes:
            plan.add(self._node(module, path, children=False))
        if path in plan.selection.boundaries:
            method = context.orig_method.func
            with _compat.captured_once(module, context.method_name):
                return _compat.lift_linen(checkpointed(plan.policy), method, module, args, kwargs)
        if kind == "Jit":
            with _TRACING((plan.number, plan.inside(path))):
                return next_fun(*args, **kwargs)
        return next_fun(*args, **kwargs)


def settings_policy(cls: type) -> Policy:
    policy = _nearest_settings(cls).policy
    return policy if policy is not None else Policy()


def ask_where(policy: Policy, module: Any, path: str) -> bool:
    """CUSTOM's answer for one module; anything but a bool is an error."""
    for rule in policy.checkpoint:
        if rule.where is not None:
            answer = rule.where(module)
            if not isinstance(answer, bool):
                raise TypeError(
                    f"custom_policy returned {answer!r} for {path or type(module).__name__}: return True or False."
                )
            if answer:
                return True
    return False


def in_remat(module: nn.Module) -> bool:
    """Whether a module is traced inside ``nn.remat`` or a boundary of ours."""
    return any("remat(" in part for part in module.scope.debug_path)


def _stack() -> list[_Open]:
    if not hasattr(_ACTIVE, "stack"):
        _ACTIVE.stack = []
    return _ACTIVE.stack


def _is_open(root: nn.Module) -> bool:
    return any(o.cls is type(root) and o.prefix == root.path for o in _stack())


@contextlib.contextmanager
def _noted(opened: _Open) -> Iterator[None]:
    _stack().append(opened)
    try:
        yield
    finally:
        _stack().pop()


@contextlib.contextmanager
def _running(opened: _Open, token: Any) -> Iterator[None]:
    with _noted(opened), _TRACING(token), nn.intercept_methods(opened.intercept):
        yield


@contextlib.contextmanager
def _opened(root: nn.Module, method: str, args: Any, kwargs: Any, policy: Policy) -> Iterator[None]:
    """Trace one call of ``root`` under ``policy``."""
    if not policy.checkpoint or in_remat(root):
        yield
        return
    key = _key(root, policy)
    looking = bool(_stack()) and _stack()[-1].plan is None and _stack()[-1].cls is type(root)
    if looking:
        yield
        return
    if root.is_initializing():
        # Nothing to save in a model that is being initialised, but its modules show themselves.
        if key in _PLANS:
            yield
            return
        look = _Open(root, None)
        with _running(look, ("look", next(_Plan.numbers))):
            yield
        _remember(key, root, policy, look.found())
        return
    if key not in _PLANS:
        _remember(key, root, policy, _look_ahead(root, method, args, kwargs, policy))
    plan = _PLANS[key]
    _LATEST[type(root)] = plan
    with _running(_Open(root, plan), (plan.number, plan.inside(()))):
        yield


def _remember(key: Any, root: nn.Module, policy: Policy, nodes: dict[Path, ModuleNode]) -> None:
    if len(_PLANS) >= 256:
        _PLANS.pop(next(iter(_PLANS)))
    _PLANS[key] = _LATEST[type(root)] = _Plan(policy, nodes)


_LOOKS: dict[Any, dict[Path, ModuleNode]] = {}


def _look_ahead(root: nn.Module, method: str, args: Any, kwargs: Any, policy: Policy) -> dict[Path, ModuleNode]:
    """Meet the modules of a call by tracing it abstractly; costs one forward trace, once per model.

    The same call under another policy meets the same modules, unless that asks something of each.
    """
    unbound, variables = root.unbind()
    arrays, rebuild = split((variables, args, kwargs))
    key = _look_key(root, policy, method, arrays, rebuild)
    if key in _LOOKS:
        return dict(_LOOKS[key])
    rngs = {name: jax.random.key(0) for name in root.scope.rngs}
    look = _Open(root, None)
    look.prefix = ()

    def forward(*arrays):
        variables, args, kwargs = rebuild(list(arrays))
        out = unbound.apply(variables, *args, method=method, rngs=rngs, mutable=root.scope.mutable, **kwargs)
        return split(out)[0]

    with _running(look, ("look", next(_Plan.numbers))):
        jax.eval_shape(forward, *arrays)
    found = look.found()
    if key is not None:
        if len(_LOOKS) >= 64:
            _LOOKS.pop(next(iter(_LOOKS)))
        _LOOKS[key] = dict(found)
    return found


def _look_key(root: nn.Module, policy: Policy, method: str, arrays: list[Any], rebuild: Any) -> Any:
    """What the modules of a call depend on; None for a call that can be told from no other."""
    types = tuple((x.shape, x.dtype) for x in arrays)
    fields = _key(root, policy)[-1]
    key = (base_of(type(root)), fields, method, rebuild, types, tuple(root.scope.rngs), str(root.scope.mutable))
    try:
        hash(key)
    except TypeError:  # a flag that cannot be hashed
        return None
    return None if any(rule.where is not None for rule in policy.checkpoint) else key


# --- running things at a boundary ----------------------------------------------------------------------------------


def call(run: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, method: Any = None) -> Any:
    """``module(*args, **kwargs)``, or another method of it, as a boundary, from inside a model's own forward."""
    method = method or (lambda module, *args, **kwargs: module(*args, **kwargs))
    if module.scope is None:
        raise ValueError(
            f"{type(module).__name__} is unbound: checkpoint_fn calls a submodule inside the forward of a bound model."
        )
    if module.is_initializing() or in_remat(module):
        return method(module, *args, **kwargs)
    return _compat.lift_linen(run, method, module, args, kwargs)


@contextlib.contextmanager
def offloading() -> Iterator[None]:
    """Run every outermost linen module call in this block under the offloader that is in force."""

    def intercept(next_fun, args, kwargs, context):
        module, offloader = context.module, ambient.current()
        if context.method_name == "setup" or module.scope is None or module.is_initializing() or offloader is None:
            return next_fun(*args, **kwargs)
        with ambient.covered(), _compat.captured_once(module, context.method_name):
            return _compat.lift_linen(offloader.run, context.orig_method.func, module, args, kwargs, name="offload")

    with nn.intercept_methods(intercept):
        yield
