"""nnx: the modules of a model are there to be read; a boundary is a module with a transformed class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from nexus_jax import _compat, ambient
from nexus_jax.adapters.classes import Settings, base_of, settings_of, transformed
from nexus_jax.adapters.linen import ask_where
from nexus_jax.boundary import checkpointed, planned
from nexus_jax.policy.rules import Policy, Whole
from nexus_jax.policy.select import ModuleNode, Path, Selection, _natural, check_selection, select

_SINGLE_OPS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.Embed, nnx.Dropout)
_CONTAINERS = (nnx.List, nnx.Dict)
_INSIDE = jax.make_user_context(False)


def accepts(model: Any) -> bool:
    return isinstance(model, nnx.Module)


def type_of(module: nnx.Module) -> type:
    return base_of(type(module))


def count_params(module: nnx.Module) -> int:
    return sum(math.prod(shape) for _, shape, _ in _params(module))


def _params(module: nnx.Module) -> tuple:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return tuple((jax.tree_util.keystr(p), tuple(x.shape), str(x.dtype)) for p, x in leaves if hasattr(x, "shape"))


def _printed(path: tuple) -> Path:
    return tuple(str(part) for part in path)


def _stacked(module: nnx.Module) -> bool:
    """Whether parameters carry a leading axis of layers, as those that ``nnx.vmap`` made for ``nnx.scan``."""
    for _, child in nnx.iter_modules(module):
        for name, rank in _ranks(child):
            value = getattr(child, name, None)
            if isinstance(value, nnx.Variable) and hasattr(value.get_value(), "ndim") and value.get_value().ndim > rank:
                return True
    return False


def _ranks(module: Any) -> tuple[tuple[str, int], ...]:
    match module:
        case nnx.Linear():
            return (("kernel", 2),)
        case nnx.Embed():
            return (("embedding", 2),)
        case nnx.Conv():
            return (("kernel", len(module.kernel_size) + 2),)
        case nnx.LayerNorm() | nnx.RMSNorm() | nnx.BatchNorm() | nnx.GroupNorm():
            return (("scale", 1), ("bias", 1))
    return ()


def module_nodes(model: nnx.Module, policy: Policy) -> tuple[dict[Path, nnx.Module], list[ModuleNode]]:
    """Every module below the root once, by its first path, in natural order."""
    found = {_printed(path): module for path, module in nnx.iter_modules(model) if path}
    found = {p: m for p, m in sorted(found.items(), key=lambda item: _natural(item[0]))}
    modules = {p: m for p, m in found.items() if not isinstance(m, _CONTAINERS) and callable(m)}
    stacked = {p for p, m in modules.items() if _stacked(m)} if not _stacked_everywhere(model, modules) else set()
    nodes = []
    for path, module in modules.items():
        cls = type_of(module)
        params = _params(module)
        children = any(p[: len(path)] == path and p != path for p in modules)
        inner = any(path[:i] in stacked for i in range(1, len(path)))
        nodes.append(
            ModuleNode(
                path=path,
                type=cls.__name__,
                params=params,
                size=sum(math.prod(shape) for _, shape, _ in params),
                single_op=not children and cls in _SINGLE_OPS,
                leaf_layer=not children and cls.__module__.startswith("flax."),
                scanned=path in stacked and not inner and _all_stacked(path, modules),
                where=ask_where(policy, module, "/".join(path)),
            )
        )
    return modules, nodes


def _all_stacked(path: Path, modules: dict[Path, nnx.Module]) -> bool:
    """Whether every layer of Flax's own below ``path`` is stacked: the module, and not only a part of it."""
    known = [m for p, m in modules.items() if p[: len(path)] == path and _ranks(m)]
    return bool(known) and all(_stacked(m) for m in known)


def _stacked_everywhere(model: nnx.Module, modules: dict[Path, nnx.Module]) -> bool:
    """A model that is itself one of a stack (an ensemble): no layer of it is a step of a scan."""
    return _all_stacked((), modules)


def transform(model: nnx.Module, **changes: Any) -> nnx.Module:
    """A copy of the model (new Variables, same arrays) with these settings changed; boundaries where they say."""
    new = nnx.clone(model)
    given = dataclasses.replace(settings(model), **changes)
    policy = given.policy if given.policy is not None else Policy()
    _, nodes = module_nodes(new, policy)
    selection = select(policy, nodes)
    check_selection(policy, selection, nodes)
    for path, module in nnx.iter_modules(new):
        own = Settings()
        if not path:
            own = given
        elif _printed(path) in selection.boundaries:
            own = Settings(boundary=policy.inside)
        cls = transformed(type_of(module), own, _members)
        if cls is not type(module):
            object.__setattr__(module, "__class__", cls)
    return new


def settings(model: nnx.Module) -> Settings:
    return settings_of(type(model))


def selection_of(model: nnx.Module) -> Selection | None:
    policy = settings(model).policy
    return None if policy is None else select(policy, module_nodes(model, policy)[1])


def _members(base: type) -> dict[str, Any]:
    original = getattr(base, "__call__", None)  # noqa: B004
    if original is None:  # a container, say: there is no call to run at a boundary
        return {}

    @functools.wraps(original)
    def __call__(self, *args, **kwargs):
        return _enter(original, self, args, kwargs)

    return {"__call__": __call__}


def _enter(original: Callable[..., Any], self: nnx.Module, args: Any, kwargs: Any) -> Any:
    """One call of a module with a transformed class."""
    given = settings_of(type(self))
    with contextlib.ExitStack() as stack:
        if given.policy is not None and not _INSIDE.value:
            stack.enter_context(_checked(self))
        if given.scope is not None:
            stack.enter_context(jax.named_scope(given.scope))
        if given.boundary is not None and not _INSIDE.value:
            _ENTERED.add(_kind(self))
            stack.enter_context(_INSIDE(True))
            return _compat.lift_nnx(checkpointed(given.boundary), original, self, args, kwargs)
        if given.offloader is not None:
            stack.enter_context(given.offloader.in_force())
        whole = None if given.policy is None or _INSIDE.value else given.policy.whole
        run = original if whole is None else functools.partial(_planned, original, whole)
        offloader = ambient.current()
        if offloader is None:
            return run(self, *args, **kwargs)
        stack.enter_context(ambient.covered())
        return _compat.lift_nnx(offloader.run, run, self, args, kwargs)


def _planned(original: Callable[..., Any], whole: Whole, self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    """A root's call under a policy that decides for all of it."""
    with _INSIDE(True):
        return _compat.lift_nnx(planned(whole, type(self)), original, self, args, kwargs)


# Kinds of boundary that ran, and kinds of model that were looked at.
_ENTERED: set[Any] = set()
_CHECKED: set[Any] = set()


def _kind(module: nnx.Module) -> Any:
    given = settings_of(type(module))
    return type_of(module), given.policy, given.boundary


@contextlib.contextmanager
def _checked(model: nnx.Module) -> Iterator[None]:
    """Say so where the first call of a model runs none of its boundaries: layers called by another method than call."""
    yield
    if _kind(model) in _CHECKED:
        return
    _CHECKED.add(_kind(model))
    kinds = {_kind(m): path for path, m in nnx.iter_modules(model) if settings_of(type(m)).boundary}
    if kinds and _ENTERED.isdisjoint(kinds):
        (cls, *_), path = next(iter(kinds.items()))
        warnings.warn(
            f"nothing is checkpointed in this call of {type(model).__name__}: a boundary is the __call__ of a module, "
            f"and {'/'.join(_printed(path))} ({cls.__name__}) was not called so. Call its __call__, or write "
            'SelectiveCheckpoint(policy="all")(module.method, ...) where another method is called.',
            stacklevel=2,
        )


def is_single_op(module: nnx.Module) -> bool:
    """Whether a boundary around the module would free nothing: its only residuals are its inputs."""
    return type_of(module) in _SINGLE_OPS


def call(run: Callable[..., Any], module: nnx.Module, args: Any, kwargs: Any, method: Any = None) -> Any:
    """``module(*args, **kwargs)``, or another method of it, as a boundary, from inside a model's own forward."""
    return _compat.lift_nnx(run, method or type(module).__call__, module, args, kwargs)


def call_function(run: Callable[..., Any], fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``fun(*args, **kwargs)`` as a boundary, where arguments may hold nnx modules."""
    leaves = jax.tree.leaves((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Variable))
    if any(isinstance(x, nnx.Module | nnx.Variable) for x in leaves):
        return _compat.lift_nnx(run, lambda _, *a, **k: fun(*a, **k), (), args, kwargs)
    return run(lambda _, rest: fun(*rest[0], **rest[1]), (), (args, kwargs))


def state_of(x: Any) -> tuple[Any, list[bool] | None]:
    """An nnx module as its state, and for each array in it whether it is a parameter; anything else as it is."""
    if not isinstance(x, nnx.Module):
        return x, None
    state = nnx.state(x)
    kinds = {path: isinstance(v, nnx.Param) for path, v in nnx.iter_graph(x) if isinstance(v, nnx.Variable)}
    pure = nnx.to_pure_dict(state)
    leaves = jax.tree_util.tree_leaves_with_path(pure)
    return pure, [kinds[tuple(k.key for k in path)] for path, _ in leaves]


def opened_state(x: Any, state: Any) -> Any:
    """The module ``x`` with another state, whose submodules open a named scope with their path; else ``state``."""
    if not isinstance(x, nnx.Module):
        return state
    graph, own = nnx.split(x)
    nnx.replace_by_pure_dict(own, state)
    return _scoped(nnx.merge(graph, own))


def changed_state(x: Any, model: Any) -> Any:
    """What of a module's state a call may have changed: all but its parameters."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))) if isinstance(x, nnx.Module) else None


def opened(fun: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable[[Any], Any], Any]:
    """``fun(*args, **kwargs)`` as a function of one tree in which nnx modules are their state.

    The modules that ``fun`` then sees open a named scope with their path when they are called.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: isinstance(x, nnx.Module))

    def call(states):
        args, kwargs = treedef.unflatten([opened_state(x, state) for x, state in zip(leaves, states, strict=True)])
        return fun(*args, **kwargs)

    return call, [state_of(x)[0] for x in leaves]


def _scoped(model: nnx.Module) -> nnx.Module:
    nodes = [path for path, m in nnx.iter_modules(model) if path and not isinstance(m, _CONTAINERS)]
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _CONTAINERS):
            continue
        parent = max((p for p in nodes if p == path[: len(p)] and p != path), key=len, default=())
        scope = "/".join(map(str, path[len(parent) :])) or type(module).__name__
        given = dataclasses.replace(settings_of(type(module)), scope=scope)
        object.__setattr__(module, "__class__", transformed(type_of(module), given, _members))
    return model
