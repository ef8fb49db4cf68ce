"""Activation offloading: residuals wait on the host from the forward to the backward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.core
from jax.sharding import SingleDeviceSharding

from nexus_jax import _compat, adapters, ambient
from nexus_jax.boundary import offloaded
from nexus_jax.flat import is_floating
from nexus_jax.offloading.window import Windows
from nexus_jax.policy.rules import MB, nbytes
from nexus_jax.targets.compiler import find_target
from nexus_jax.targets.host import host_limit
from nexus_jax.training.verify import Verification, verify


class OffloadWarning(UserWarning):
    """Offloading was asked for and did not happen; the message says why, and what to write."""


class _Seen:
    """What was traced under one offloader, in this process: sizes only."""

    def __init__(self):
        self.offloaded = 0
        self.largest = 0
        self.traced = False


_AUTO_MB = 1.0  # what is smaller takes a link longer to start than to move

_SEEN: dict[Any, _Seen] = {}
_STORES: dict[int, Any] = {}
_IDS = itertools.count(1)
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ActivationOffloader:
    """Keep large residuals on the host between the forward and the backward pass.

    It frees device memory for the time a residual waits and costs two transfers of it. What selective checkpointing
    recomputes is not kept, so it is not moved either: the two compose.

    Args:
        enabled: if False, everything runs as it is.
        offload_threshold_mb: smallest residual that is moved, MB (2**20 bytes). ``"auto"``: of each layer, the largest
            ones as far as the link of ``target`` moves them while the layers beside them compute, and none below 1 MB.
        prefetch_ahead: layers whose residuals may be back on the device before they are needed.
        pin_memory: wait in ``pinned_host`` memory (page-locked, fast) or in ``unpinned_host``.
        target: the device that ``"auto"`` asks for its times, ``"h200"``, ``"v5e"``, ...

    Raises:
        ValueError, TypeError: one sentence that says what is wrong and what to write.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(w, x):
        ...     return jnp.sum(jnp.sin(x @ w))
        >>> offloader = ActivationOffloader(offload_threshold_mb=0.0)
        >>> wrapped = offloader.wrap(loss)
        >>> bool(jnp.allclose(jax.grad(wrapped)(jnp.eye(4), jnp.ones((8, 4))), 8 * jnp.cos(1.0)))
        True
    """

    enabled: bool = True
    offload_threshold_mb: float | Literal["auto"] = 10.0
    prefetch_ahead: int = 2
    pin_memory: bool = True
    target: str | None = None

    def __post_init__(self):
        for name in ("enabled", "pin_memory"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: write True or False.")
        self._check_target()
        mb = 0 if self.offload_threshold_mb == "auto" else self.offload_threshold_mb
        if isinstance(mb, bool) or not isinstance(mb, int | float) or not math.isfinite(mb) or mb < 0:
            raise ValueError(f'offload_threshold_mb={mb!r}: write a finite number of MB, from 0 up, or "auto".')
        ahead = self.prefetch_ahead
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 0:
            raise ValueError(f"prefetch_ahead={ahead!r}: write a whole number of layers, from 0 up.")

    def _check_target(self) -> None:
        auto = self.offload_threshold_mb == "auto"
        if auto and (self.target is None or find_target(self.target).sheet is None):
            raise ValueError(
                f'offload_threshold_mb="auto" with target={self.target!r}: name the device, target="h200".'
            )
        if self.target is not None and not auto:
            raise ValueError(f'target={self.target!r} is asked with offload_threshold_mb="auto" only: leave it out.')
        if auto and self.prefetch_ahead == 0:
            raise ValueError(
                'offload_threshold_mb="auto" with prefetch_ahead=0: nothing hides a copy back then; write 1 or more.'
            )

    # --- what is moved, and where ---------------------------------------------------------------------------------

    @property
    def memory_kind(self) -> str:
        """``"pinned_host"`` or ``"unpinned_host"``."""
        return "pinned_host" if self.pin_memory else "unpinned_host"

    @property
    def threshold_bytes(self) -> float:
        """Bytes of the smallest residual that is moved."""
        return _AUTO_MB * MB if self.offload_threshold_mb == "auto" else self.offload_threshold_mb * MB

    @property
    def windows(self) -> Windows | None:
        """The time windows of ``"auto"``."""
        sheet = None if self.target is None else find_target(self.target).sheet
        return None if sheet is None else Windows(sheet)

    def _should_offload(self, x: Any) -> bool:
        """Whether an array is floating-point, on the device, and of at least the threshold."""
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"_should_offload takes an array, got {type(x).__name__}.")
        if not self.enabled or not is_floating(x):
            return False
        on_host = isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host
        return not on_host and nbytes(x) >= self.threshold_bytes

    def run(self, fun: Callable[..., Any], weights: Any, rest: Any, inputs: bool = False) -> Any:
        """``fun(weights, rest)`` with its residuals on the host; the boundary that adapters open models at."""
        if ambient.is_silenced():
            return fun(weights, rest)
        seen, here, alone = self._seen, _Seen(), not ambient.is_context()

        def wanted(leaf: Any) -> bool:
            if is_floating(leaf):
                here.largest = max(here.largest, nbytes(leaf))
            return self._should_offload(leaf)

        def traced(moved: int) -> None:
            seen.traced = here.traced = True
            seen.largest = max(seen.largest, here.largest)
            seen.offloaded += moved
            self._check_host(moved)
            if alone and not moved:
                _say_once(self._nothing(here))

        move = offloaded(wanted, self._to_host, self._to_device, self.prefetch_ahead, traced, self.windows)
        return move(fun, weights, rest, inputs)

    def _check_host(self, wanted: int) -> None:
        """Say that the host is too small for what one gradient sends there, of all devices together."""
        target = find_target(self.target)
        limit = host_limit(target)
        if limit is not None:
            whole = limit.of_all(target.devices if target.sheet is not None else jax.device_count())
            if said := whole.refuse(wanted):
                _say_once(said)

    def _to_host(self, x: Any) -> Any:
        if self.pin_memory:
            return jax.device_put(x, jax.memory.Space.Host)
        return jax.device_put(x, _in_memory(x, "unpinned_host"))

    def _to_device(self, x: Any) -> Any:
        if self.pin_memory:
            return jax.device_put(x, jax.memory.Space.Device)
        return jax.device_put(x, _in_memory(x, jax.devices()[0].default_memory().kind))

    @property
    def _seen(self) -> _Seen:
        with _LOCK:
            return _SEEN.setdefault(self, _Seen())

    # --- the context and the wrapper ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def offload_context(self) -> Iterator[ActivationOffloader]:
        """Offload the residuals of what is traced inside.

        Around ``jax.grad``, ``jax.value_and_grad``, ``jax.vjp`` or their nnx twins it reaches whatever they
        differentiate. Opened inside a function that is being differentiated, it reaches every linen model, and every
        nnx model or function that came from :meth:`wrap`, ``apply_selective_checkpointing`` or
        ``SelectiveCheckpoint``: the calls of other nnx modules nobody can see from outside. It is part of the key of
        jit's caches, so a warm cache neither hides it nor leaks it. The innermost context is the one in force; a
        disabled one turns an outer one off.

        Raises:
            ValueError: the device has host memory, but not of the kind asked for.

        Warns:
            OffloadWarning: nothing was offloaded, and why; or the host is too small for what is (of ``target``, or of this
                machine if it has a GPU or a TPU): bytes wanted, bytes there.
        """
        with self.in_force(context=True) as active:
            yield self
        seen = self._seen
        if active and not seen.offloaded:
            warnings.warn(self._nothing(seen), OffloadWarning, stacklevel=3)

    @contextlib.contextmanager
    def in_force(self, context: bool = False) -> Iterator[bool]:
        """Offload what is traced inside, without a word on leaving: what a wrapped model's every call enters.

        Args:
            context: whether somebody will say on leaving if nothing was offloaded.

        Yields whether there is a host memory to offload to.
        """
        active = self.enabled and self._host_memory()
        used = ambient.using(self if active else None, context=context)
        with used, adapters.linen.offloading(), _compat.vjp_through(_offloaded_vjp):
            yield active

    def _nothing(self, seen: _Seen) -> str:
        if seen.traced and not seen.largest:
            return (
                "nothing was offloaded: nothing floating-point is kept but arguments, and what "
                "elementwise operations make of them again."
            )
        if seen.traced and self.offload_threshold_mb == "auto" and seen.largest >= self.threshold_bytes:
            return (
                f"nothing was offloaded: the largest residual is {seen.largest / MB:.3g} MB, and the link "
                f"of {self.target} moves none while a layer computes. Write offload_threshold_mb=1.0 to move what is not "
                "hidden too, or recompute."
            )
        if seen.traced:
            return (
                f"nothing was offloaded: the largest residual is {seen.largest / MB:.3g} MB, below "
                f"offload_threshold_mb={self.threshold_bytes / MB:g}; write a smaller one."
            )
        return (
            "nothing was offloaded: no gradient was traced in this context. Open it around jax.grad(...) or "
            "nnx.grad(...); where it is inside the loss, write model = offloader.wrap(model)."
        )

    def wrap(self, model_or_function: Any) -> Any:
        """A model or function whose residuals are offloaded wherever it is differentiated.

        Args:
            model_or_function: a linen module (instance or class), an nnx module, or a function of pytrees and nnx
                modules. A model comes back as a transformed copy, as from ``apply_selective_checkpointing``.

        Warns:
            OffloadWarning: where a gradient of it is traced and nothing is offloaded, once: the threshold and the largest
                residual. ``offload_context`` says it on leaving.
        """
        if adapters.is_module(model_or_function):
            return adapters.of(model_or_function).transform(model_or_function, offloader=self if self.enabled else None)
        if not callable(model_or_function):
            raise TypeError(f"wrap takes a Flax module or a function, got {type(model_or_function).__name__}.")

        @functools.wraps(model_or_function)
        def wrapped(*args, **kwargs):
            if not self.enabled or not self._host_memory():
                return model_or_function(*args, **kwargs)
            with ambient.using(self), ambient.covered():
                return adapters.nnx.call_function(self.run, model_or_function, args, kwargs)

        return wrapped

    def _host_memory(self) -> bool:
        """Whether there is a host memory to move to; says once where moving moves nothing."""
        device = jax.devices()[0]
        kinds = _memory_kinds(device)
        hosts = [k for k in kinds if k.endswith("_host") and k != device.default_memory().kind]
        if not hosts:
            _say_once(
                f"nothing is offloaded on {device.platform}: it has no host memory apart from its own "
                f"(memory kinds: {', '.join(kinds)})."
            )
            return False
        if self.memory_kind not in kinds:
            raise ValueError(
                f"{device.platform} has no {self.memory_kind} memory (it has {', '.join(kinds)}): "
                f"write pin_memory={not self.pin_memory}."
            )
        if device.platform == "cpu":
            _say_once(
                "on the CPU, host memory is the device's own: programs are as on a GPU or TPU, but nothing moves."
            )
        return True

    def verify(self, step: Callable[..., Any], *args: Any, rtol: float | None = None) -> Verification:
        """Run a step with and without offloading, and compare every array that it returns.

        Args:
            step: a loss (its gradients by the first argument are compared too), or a whole training step that returns
                what it computes. It runs twice, on copies of ``args``: what it donates or changes is not lost.
            rtol: what may differ, of an array's largest value; by default the square root of its precision.

        Raises:
            OffloadMismatch: names the first array that differs.

        Warns:
            OffloadWarning: nothing was offloaded, so that nothing was compared with anything.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> offloader = ActivationOffloader(offload_threshold_mb=0.0)
            >>> loss = offloader.wrap(lambda w, x: jnp.sum(jnp.sin(x @ w)))
            >>> len(offloader.verify(loss, jnp.eye(4), jnp.ones((8, 4))).leaves)
            2
        """
        found = verify(step, args, functools.partial(self.in_force, context=True), rtol)
        if self.enabled and not self._seen.offloaded:
            warnings.warn(self._nothing(self._seen), OffloadWarning, stacklevel=2)
        return found

    # --- by hand --------------------------------------------------------------------------------------------------

    def _offload_to_cpu(self, x: jax.Array) -> int:
        """Copy a concrete array to the host and return the id under which it waits, for :meth:`_prefetch_to_gpu`."""
        if isinstance(x, jax.core.Tracer):
            raise TypeError(
                "_offload_to_cpu takes a concrete array: inside jit or grad use offload_context() or wrap(model)."
            )
        if not isinstance(x, jax.Array):
            raise TypeError(f"_offload_to_cpu takes a jax.Array, got {type(x).__name__}.")
        kept = x
        if self._host_memory():
            kept = jax.device_put(x, x.sharding.with_memory_kind(self.memory_kind))
        storage_id = next(_IDS)
        _STORES[storage_id] = kept
        return storage_id

    def _prefetch_to_gpu(self, storage_id: int, device: Any = None) -> jax.Array:
        """Copy an array back to a device (a ``jax.Device`` or a sharding; its old place by default), once."""
        try:
            x = _STORES.pop(storage_id)
        except KeyError:
            raise ValueError(
                f"no array waits under id {storage_id!r}: an id from _offload_to_cpu can be fetched once."
            ) from None
        if device is None:
            kind = next(iter(x.sharding.device_set)).default_memory().kind
            device = x.sharding.with_memory_kind(kind)
        elif isinstance(device, jax.Device):
            device = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        return jax.device_put(x, device)


def _offloaded_vjp(vjp: Callable[..., Any], fun: Callable[..., Any], *primals: Any, **kwargs: Any) -> Any:
    """``jax.vjp(fun, *primals)`` under the offloader that is in force."""
    offloader = ambient.current()
    if offloader is None or not callable(fun):
        return vjp(fun, *primals, **kwargs)

    @functools.wraps(fun, updated=())
    def moved(*primals):
        with ambient.covered():
            return offloader.run(lambda weights, _: fun(*weights), primals, ())

    return vjp(moved, *primals, **kwargs)


def _in_memory(x: Any, kind: str) -> Any:
    """Where ``x`` is, but in this memory: the one memory space that a program can name without a device is pinned."""
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return x.sharding.with_memory_kind(kind)
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    if any(axis != jax.sharding.AxisType.Explicit for axis in sharding.mesh.axis_types):
        raise ValueError(
            "pin_memory=False has to name the devices of what it moves, and how an array is sharded over the mesh "
            f"{dict(sharding.mesh.shape)} with axes that are not Explicit is unknown while it is traced: "
            "write pin_memory=True."
        )
    return sharding.with_memory_kind(kind)


def _memory_kinds(device: Any) -> list[str]:
    return [memory.kind for memory in device.addressable_memories()]


_SAID: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _SAID:
        _SAID.add(message)
        warnings.warn(message, OffloadWarning, stacklevel=4)
