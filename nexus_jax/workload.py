"""A workload: a function in a user's file that returns a loss and its abstract arguments."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from nexus_jax.program import called


class WorkloadError(ValueError):
    """A workload that cannot be loaded, or does not return what it should."""


class Workload:
    """A callable ``workload(policy=..., **sizes) -> (loss, arguments)``.

    Args:
        fun: the user's function. It may take ``policy`` (a name, a file or a :class:`nexus_jax.Policy`) and any sizes
            with defaults (``batch=8``, ``length=1024``); it returns ``(loss, arguments)``, where ``loss(*arguments)``
            is a scalar and arguments are arrays, ``ShapeDtypeStruct``s or nnx modules.
        settings: values for its parameters.
        name: what to call it in messages.
    """

    def __init__(self, fun: Callable[..., Any], settings: Mapping[str, Any] | None = None, name: str | None = None):
        if not callable(fun):
            raise WorkloadError(f"a workload is a function that returns (loss, arguments), not {type(fun).__name__}.")
        self.fun = fun
        self.settings = dict(settings or {})
        self.name = name or called(fun)
        self.parameters = inspect.signature(fun).parameters
        for given in self.settings:
            self.require(given)

    def require(self, parameter: str) -> None:
        """Raise a :class:`WorkloadError` unless the function takes this parameter."""
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters.values())
        if parameter not in self.parameters and not takes_any:
            has = ", ".join(self.parameters) or "none"
            raise WorkloadError(f"{self.name} takes no parameter {parameter!r} (it has {has}): add one with a default.")

    def default(self, parameter: str) -> Any:
        """The value that a parameter has without being set."""
        self.require(parameter)
        if parameter in self.settings:
            return self.settings[parameter]
        found = self.parameters[parameter].default if parameter in self.parameters else inspect.Parameter.empty
        if found is inspect.Parameter.empty:
            raise WorkloadError(
                f"{self.name}: the parameter {parameter!r} has no default; write {parameter}=... (--set)"
            )
        return found

    def __call__(self, policy: Any = None, **sizes: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The loss and its arguments under a policy; None leaves the workload's own."""
        given = {**self.settings, **sizes}
        if policy is not None:
            self.require("policy")
            given["policy"] = policy
        for name, parameter in self.parameters.items():
            if name not in given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                self.default(name)
        found = self.fun(**given)
        if not (isinstance(found, tuple) and len(found) == 2 and callable(found[0])):
            kinds = (
                f"({', '.join(type(x).__name__ for x in found)})" if isinstance(found, tuple) else type(found).__name__
            )
            raise WorkloadError(
                f"{self.name} must return (loss, arguments): a function and a tuple; it returned {kinds}."
            )
        loss, args = found
        if not isinstance(args, tuple | list):
            raise WorkloadError(
                f"{self.name} must return (loss, arguments) with a tuple of arguments, not {type(args).__name__}."
            )
        arrays = [x for x in jax.tree.leaves(tuple(args), is_leaf=_is_module) if hasattr(x, "dtype") or _is_module(x)]
        if not arrays:
            raise WorkloadError(
                f"{self.name} returned no arguments that hold arrays: give shapes as jax.ShapeDtypeStruct."
            )
        return loss, tuple(args)


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def load(text: str, settings: Mapping[str, str] | None = None) -> Workload:
    """The workload of ``"file.py:function"``; settings are Python literals as text, else strings.

    Raises:
        WorkloadError: with the file and, where there is one, the line.
    """
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier():
        raise WorkloadError(f"{text!r} is no workload: write file.py:function.")
    file = pathlib.Path(path)
    if not file.is_file():
        raise WorkloadError(f"{path}: no such file.")
    module = _import(file)
    found = getattr(module, name, None)
    if found is None:
        functions = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise WorkloadError(f"{path} has no {name!r}; its functions are {', '.join(functions) or '(none)'}.")
    return Workload(found, {k: _literal(v) for k, v in (settings or {}).items()}, f"{path}:{name}")


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _import(file: pathlib.Path) -> Any:
    name = f"nexus_jax_workload_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise WorkloadError(f"{file}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent.resolve()))  # its neighbours, as when it is run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"{file}: {described(error, file)}") from error
    finally:
        sys.path.pop(0)
    return module


def described(error: BaseException, file: pathlib.Path | None = None) -> str:
    """An exception in one sentence, with the line of ``file`` that led to it.

    Errors that are meant for a user are sentences already; of others the first line is told, and their type.
    """
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: SyntaxError: {error.msg}"
    line = None if file is None else _line_of(error, file)
    at = "" if line is None else f"line {line}: "
    lines = str(error).strip().splitlines()
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{at}{error.filename}: {error.strerror}"
    if isinstance(error, SystemExit):
        return f"{at}it ended the program (exit status {error.code or 0})"
    plain = type(error) in (ValueError, RuntimeError) or type(error).__module__.startswith("nexus_jax.")
    if plain and lines:
        return at + " ".join(str(error).split())
    return f"{at}{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _line_of(error: BaseException | None, file: pathlib.Path) -> int | None:
    """The innermost line of a file that an exception, or what it was made of, went through."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f.lineno for f in frames if pathlib.Path(f.filename).resolve() == file.resolve()]
        if own:
            return own[-1]
        error = error.__cause__
    return None
