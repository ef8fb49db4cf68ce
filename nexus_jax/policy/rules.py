"""The policy: frozen rules that choose boundaries and, inside a boundary, the place of each residual."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

PLACES = ("save", "recompute", "offload")
MB = 2**20  # as in the documented API, whose offload_threshold_mb this unit is


def _check_number(name: str, value: Any, *, integer: bool) -> None:
    kinds = int if integer else (int, float)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or value < 0:
        what = "a whole number from 0 up" if integer else "a finite number from 0 up"
        raise ValueError(f"{name}={value!r}: write {what}.")


def _check_regex(name: str, value: str | None) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: write a regular expression as a string.")
    try:
        re.compile(value)
    except re.error as e:
        raise ValueError(f"{name}={value!r} does not compile as a regular expression: {e}.") from None


def parse_slice(text: str) -> slice:
    """`"1::2"` as a slice; the error says what to write."""
    parts = text.split(":") if isinstance(text, str) else []
    try:
        if not 2 <= len(parts) <= 3:
            raise ValueError
        result = slice(*(int(p) if p.strip() else None for p in parts))
        if result.step == 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'layers={text!r}: write a slice of the layers, as "::2" (every other) or "-4:" (the last four).'
        ) from None
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointRule:
    """Which module calls become boundaries; every condition that is given must hold.

    Args:
        type: regular expression for the whole class name.
        path: regular expression for the whole printed path below the root, as ``"blocks_3/attn"``.
        min_params: at least this many parameters.
        layers: a slice of each family of layers, as ``"::2"``; also requires being in a family, and without ``type``
            or ``path`` in one that is not inside a layer.
        depth: this many modules below the root (1: the root's children).
        family: ``False`` requires that the module is in no family of layers and contains none.
        fallback: the rule counts only where no rule without it selects anything.
        where: ``where(module) -> bool``, for CUSTOM; a policy that has one cannot be written to a file.
    """

    type: str | None = None
    path: str | None = None
    min_params: int | None = None
    layers: str | None = None
    depth: int | None = None
    family: bool | None = None
    fallback: bool = False
    where: Callable[[Any], bool] | None = None

    def __post_init__(self):
        _check_regex("type", self.type)
        _check_regex("path", self.path)
        _check_number("min_params", self.min_params, integer=True)
        _check_number("depth", self.depth, integer=True)
        for name in ("family", "fallback"):
            value = getattr(self, name)
            if not (isinstance(value, bool) or (value is None and name == "family")):
                raise ValueError(f"{name}={value!r}: write true or false.")
        if self.layers is not None:
            parse_slice(self.layers)
        if self.where is not None and not callable(self.where):
            raise TypeError(f"where={self.where!r}: write a function of one module that returns a bool.")
        if all(getattr(self, f) is None for f in ("type", "path", "min_params", "layers", "depth", "family", "where")):
            raise ValueError("a checkpoint rule needs a condition: type, path, min_params, layers, depth or family.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualRule:
    """What becomes of the values inside a boundary; every condition that is given must hold.

    Args:
        place: ``"save"``, ``"recompute"`` or ``"offload"``.
        op: the primitive's name as a jaxpr prints it, or several.
        batch_dims: whether a ``dot_general`` has batch dimensions.
        weight: whether the op is a matmul or convolution with exactly one operand from the parameters.
        feeds: ``"weight"``: the value is an operand of such a matmul, up to views and casts.
        name: a ``checkpoint_name``, or several.
        min_mb: at least this many MB (2**20 bytes, as offload_threshold_mb).
        dtype: a dtype name as ``"bfloat16"``, or several.
    """

    place: str
    op: str | tuple[str, ...] | None = None
    batch_dims: bool | None = None
    weight: bool | None = None
    feeds: str | None = None
    name: str | tuple[str, ...] | None = None
    min_mb: float | None = None
    dtype: str | tuple[str, ...] | None = None

    def __post_init__(self):
        if self.place not in PLACES:
            raise ValueError(f"place={self.place!r}: write one of {', '.join(PLACES)}.")
        for key in ("op", "name", "dtype"):
            value = getattr(self, key)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, key, value)
            names = (value,) if isinstance(value, str) else value
            if names is not None and not (
                isinstance(names, tuple) and names and all(isinstance(n, str) and n for n in names)
            ):
                raise ValueError(f"{key}={value!r}: write a name, or a list of names.")
        for key in ("batch_dims", "weight"):
            if not isinstance(getattr(self, key), bool | None):
                raise ValueError(f"{key}={getattr(self, key)!r}: write true or false.")
        if self.feeds not in (None, "weight"):
            raise ValueError(f'feeds={self.feeds!r}: write "weight", the one thing it can say.')
        _check_number("min_mb", self.min_mb, integer=False)

    def matches(
        self,
        *,
        op: str,
        aval: Any,
        params: dict[str, Any],
        weight: bool | None,
        feeds_weight: bool | None,
    ) -> bool:
        """Whether the rule holds for one output of one equation; ``None`` flags are unknown and never match."""
        if self.op is not None and op not in _names(self.op):
            return False
        if self.name is not None and not (op == "name" and params.get("name") in _names(self.name)):
            return False
        if self.batch_dims is not None and (
            op != "dot_general" or bool(params["dimension_numbers"][1][0]) != self.batch_dims
        ):
            return False
        if self.weight is not None and weight is not self.weight:
            return False
        if self.feeds is not None and feeds_weight is not True:
            return False
        if self.min_mb is not None and nbytes(aval) < self.min_mb * MB:
            return False
        return self.dtype is None or str(getattr(aval, "dtype", "")) in _names(self.dtype)


def _names(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def nbytes(aval: Any) -> int:
    """Bytes of an array type; 0 for tokens and other things without a shape."""
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize


class Whole(Protocol):
    """What decides for a model's whole call at once, value by value: a budget, or a plan. Hashable."""

    def program(self, call: Any) -> Callable[..., list[Any]]:
        """The program of a :class:`nexus_jax.boundary.Call` as it is differentiated: takes and returns the same arrays."""
        ...

    def document(self) -> dict[str, Any]:
        """What a policy's file says of it."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules that choose boundaries and places: a value, equal to any other with the same rules.

    It can be given to :func:`nexus_jax.apply_selective_checkpointing`, which uses all of it, and directly to
    ``jax.checkpoint(f, policy=...)`` or ``nn.remat(..., policy=...)``, which use its residual rules. There the
    parameters cannot be told from the data, so ``weight = true`` means a convolution or a ``dot_general`` without
    batch dimensions, and ``feeds`` never holds.

    Example:
        >>> import nexus_jax
        >>> nexus_jax.load_policy("alternate").checkpoint[0].layers
        '::2'
    """

    name: str = "policy"
    summary: str = ""
    checkpoint: tuple[CheckpointRule, ...] = ()
    residual: tuple[ResidualRule, ...] = ()
    whole: Whole | None = None
    """A budget or a plan, in the place of rules: the root is the one boundary."""
    strict: bool = True
    """Whether a checkpoint rule that selects nothing is an error (a user's policy) or a warning (a documented one)."""

    def __post_init__(self):
        for key, kind in (("checkpoint", CheckpointRule), ("residual", ResidualRule)):
            rules = getattr(self, key)
            if isinstance(rules, list):
                rules = tuple(rules)
                object.__setattr__(self, key, rules)
            if not isinstance(rules, tuple) or not all(isinstance(r, kind) for r in rules):
                raise TypeError(f"{key}={rules!r}: write a tuple of {kind.__name__}.")
        if self.whole is not None and (self.checkpoint or self.residual):
            raise ValueError("a policy has rules, or a memory budget or plan that decides everything: not both.")

    @property
    def recomputes_everything(self) -> bool:
        """Whether nothing inside a boundary is kept."""
        return all(rule.place == "recompute" for rule in self.residual)

    @property
    def offloads(self) -> bool:
        """Whether some rule sends values to the host."""
        return any(rule.place == "offload" for rule in self.residual)

    @property
    def inside(self) -> Policy:
        """What the policy means inside a boundary: its residual rules alone."""
        return Policy(residual=self.residual)

    def place_of(self, **equation: Any) -> str:
        """The place of one output of one equation: the first rule that matches, else recompute."""
        for rule in self.residual:
            if rule.matches(**equation):
                return rule.place
        return "recompute"

    def __call__(self, prim: Any, *avals: Any, **params: Any) -> Any:
        """As a policy of ``jax.checkpoint``: what to do with the outputs of one primitive."""
        from nexus_jax import _compat

        if self.whole is not None:
            raise ValueError(
                f"policy {self.name!r} decides for a model's whole call: give it to apply_selective_checkpointing, not "
                "to jax.checkpoint."
            )
        if self.recomputes_everything:
            return False
        op = prim.name
        aval = _compat.output_aval(prim, avals, params)
        weight = op == "conv_general_dilated" or (op == "dot_general" and not params["dimension_numbers"][1][0])
        place = self.place_of(op=op, aval=aval, params=params, weight=weight, feeds_weight=None)
        if place == "offload":
            _compat.require_offload_policies()
            return _compat.OFFLOADABLE
        return place == "save"

    def save(self, path: Any) -> None:
        """Write the policy as TOML, in the grammar that :func:`nexus_jax.load_policy` reads."""
        from nexus_jax.policy import files

        files.save(self, path)

    def __str__(self) -> str:
        lines = [f"policy {self.name}: {self.summary}".rstrip(": ")]
        if self.whole is not None:
            lines.append("  " + str(self.whole).replace("\n", "\n  "))
        for kind, rules in (("checkpoint", self.checkpoint), ("residual", self.residual)):
            for rule in rules:
                said = ", ".join(
                    f"{f.name}={getattr(rule, f.name)!r}"
                    for f in dataclasses.fields(rule)
                    if getattr(rule, f.name) not in (None, False)
                )
                lines.append(f"  {kind}: {said}")
        return "\n".join(lines)
