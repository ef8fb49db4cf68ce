"""A policy's residual rules as names: rewrite a boundary's program so that `jax.checkpoint` can be told by name.

`jax.checkpoint` asks a policy about one primitive at a time, after batching, without telling it where the operands
come from. So the rules are applied here, to the boundary's own jaxpr, where a weight can be followed from the
parameters to the matmul; what they keep gets a ``checkpoint_name``, and ``jax.checkpoint`` is given names only.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from nexus_jax import _compat
from nexus_jax.policy.rules import Policy

SAVE = "nexus_jax.save"
OFFLOAD = "nexus_jax.offload"
_NAMES = {"save": SAVE, "offload": OFFLOAD}

# One operand in, the same values out: a weight (or what feeds a matmul) is followed through these.
_VIEWS = {
    "reshape", "transpose", "convert_element_type", "squeeze", "expand_dims", "broadcast_in_dim", "copy",
    "reduce_precision", "name", "rev", "slice", "sharding_constraint", "mesh_cast", "reshard", "copy_p",
}  # fmt: skip
_MATMULS = {"dot_general", "conv_general_dilated"}
# Equations whose body is walked, by the parameter that holds it. Custom rules, while, cond and the user's own
# remat keep what their author said.
_BODIES = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "scan": "jaxpr"}


def names_policy(policy: Policy) -> Callable[..., Any]:
    """What ``jax.checkpoint`` is given beside a function rewritten by :func:`with_names`.

    One object for one policy: JAX differentiates and transposes equal layers once, if their policy is the same object.
    """
    if policy.offloads:
        _compat.require_offload_policies()
        return _OFFLOADING
    return _SAVING


_SAVING = jax.checkpoint_policies.save_only_these_names(SAVE)
_OFFLOADING = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[SAVE],
    names_which_can_be_offloaded=[OFFLOAD],
    offload_src="device",
    offload_dst="pinned_host",
)


def checkpoint_by_name(
    fun: Callable[..., Any], args: Sequence[Any], is_weight: Sequence[bool], policy: Policy
) -> list[Any]:
    """``fun(*args)`` under ``jax.checkpoint``, where every value that ``policy`` keeps has a name.

    Args:
        fun: a function of arrays that returns a flat list of arrays. JAX's cache answers where it has traced the
            same function before, and then the named program is the same object too.
        args: its arguments, arrays.
        is_weight: for each argument, whether it is a parameter. With none, a weight matmul cannot be told by its
            data, and a matmul without batch dimensions (or a convolution) counts as one.
        policy: the residual rules.
    """
    closed = jax.make_jaxpr(fun)(*args)
    known = _named.setdefault(closed.jaxpr, {})
    key = (tuple(is_weight), policy)
    if key not in known:
        known[key] = _with_names(closed.jaxpr, is_weight, policy)
    return _compat.bind_checkpoint(known[key], closed.consts, args, names_policy(policy))


_named: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_bodies: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _with_names(jaxpr: Any, is_weight: Sequence[bool], policy: Policy) -> Any:
    marker = _Marker(policy, known=any(is_weight))
    no_consts, no_outputs = [False] * len(jaxpr.constvars), [False] * len(jaxpr.outvars)
    named, _, _ = marker.rewrite(jaxpr, no_consts, list(is_weight), no_outputs)
    return _compat.without_constvars(named)


class _Marker:
    """The two passes over a jaxpr (weights forward, what feeds them backward), and the names put on the way back."""

    def __init__(self, policy: Policy, known: bool):
        self.policy = policy
        self.known = known

    def rewrite(
        self, jaxpr: Any, const_weights: list[bool], in_weights: list[bool], out_feeds: list[bool]
    ) -> tuple[Any, list[bool], list[bool]]:
        """The rewritten jaxpr, which outputs are weights, and which inputs feed a weight matmul."""
        weights = dict(zip(jaxpr.constvars, const_weights, strict=True))
        weights |= dict(zip(jaxpr.invars, in_weights, strict=True))
        self._forward(jaxpr, weights)
        feeds = {v for v, f in zip(jaxpr.outvars, out_feeds, strict=True) if f and not isinstance(v, jex.Literal)}
        eqns: list[Any] = []
        for eqn in reversed(jaxpr.eqns):
            eqns[:0] = self._mark(eqn, weights, feeds)
        out_weights = [self._get(weights, v) for v in jaxpr.outvars]
        same = len(eqns) == len(jaxpr.eqns) and all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=True))
        return jaxpr if same else jaxpr.replace(eqns=eqns), out_weights, [v in feeds for v in jaxpr.invars]

    def _body_rewritten(self, body: Any, in_weights: list[bool], out_feeds: list[bool]) -> tuple[Any, list[bool]]:
        """A body with its names, and which of its inputs feed a weight matmul.

        One object for one body: JAX differentiates and transposes a jitted function that layers share once, if they
        still share it.
        """
        known = _bodies.setdefault(body, {})
        key = (tuple(in_weights), tuple(out_feeds), self.policy, self.known)
        if key not in known:
            jaxpr, _, in_feeds = self.rewrite(body.jaxpr, [False] * len(body.consts), in_weights, out_feeds)
            same = jaxpr is body.jaxpr  # not kept under itself: it would never be forgotten
            known[key] = None if same else jex.ClosedJaxpr(jaxpr, body.consts), in_feeds
        named, in_feeds = known[key]
        return body if named is None else named, in_feeds

    @staticmethod
    def _get(weights: dict[Any, bool], atom: Any) -> bool:
        return not isinstance(atom, jex.Literal) and weights.get(atom, False)

    def _forward(self, jaxpr: Any, weights: dict[Any, bool]) -> None:
        for eqn in jaxpr.eqns:
            flags = [self._get(weights, v) for v in eqn.invars]
            body = self._body(eqn)
            if body is not None:
                _, outs, _ = self.rewrite(body.jaxpr, [False] * len(body.consts), flags, [False] * len(eqn.outvars))
                if eqn.primitive.name == "scan":  # a carry changes from step to step: data
                    # by type, since the parameter's name changes with JAX: what is stacked has an axis more
                    inner = (v.aval.ndim for v in body.jaxpr.outvars)
                    carries = sum(n == v.aval.ndim for n, v in zip(inner, eqn.outvars, strict=True))
                    outs = [False] * carries + outs[carries:]
            else:
                derived = any(flags) and all(
                    f or isinstance(v, jex.Literal) for f, v in zip(flags, eqn.invars, strict=True)
                )
                outs = [derived] * len(eqn.outvars)
            weights.update(zip(eqn.outvars, outs, strict=True))

    @staticmethod
    def _body(eqn: Any) -> Any:
        return eqn.params[_BODIES[eqn.primitive.name]] if eqn.primitive.name in _BODIES else None

    def _is_weight_matmul(self, eqn: Any, weights: dict[Any, bool]) -> bool:
        if eqn.primitive.name not in _MATMULS:
            return False
        if not self.known:
            return eqn.primitive.name != "dot_general" or not eqn.params["dimension_numbers"][1][0]
        return sum(self._get(weights, v) for v in eqn.invars) == 1

    def _mark(self, eqn: Any, weights: dict[Any, bool], feeds: set[Any]) -> list[Any]:
        """The equation with its body rewritten and its kept outputs named; updates ``feeds`` for what is before."""
        body = self._body(eqn)
        out_feeds = [v in feeds for v in eqn.outvars]
        weight_matmul = self._is_weight_matmul(eqn, weights)
        if body is not None:
            flags = [self._get(weights, v) for v in eqn.invars]
            named, in_feeds = self._body_rewritten(body, flags, out_feeds)
            if named is not body:
                eqn = eqn.replace(params={**eqn.params, _BODIES[eqn.primitive.name]: named})
        elif weight_matmul:
            in_feeds = [not self._get(weights, v) for v in eqn.invars] if self.known else [True] * 2
        elif eqn.primitive.name in _VIEWS:
            in_feeds = [any(out_feeds)] + [False] * (len(eqn.invars) - 1)
        else:
            in_feeds = [False] * len(eqn.invars)
        feeds.update(v for v, f in zip(eqn.invars, in_feeds, strict=True) if f and not isinstance(v, jex.Literal))
        if body is not None or not eqn.outvars:
            return [eqn]
        return self._named(eqn, weight_matmul, out_feeds)

    def _named(self, eqn: Any, weight_matmul: bool, out_feeds: list[bool]) -> list[Any]:
        outs, extra = [], []
        for var, fed in zip(eqn.outvars, out_feeds, strict=True):
            place = "recompute"
            if not isinstance(var, jex.DropVar) and hasattr(var.aval, "dtype"):
                place = self.policy.place_of(
                    op=eqn.primitive.name, aval=var.aval, params=eqn.params, weight=weight_matmul, feeds_weight=fed
                )
            if place in _NAMES:
                raw = jex.Var(var.aval)
                extra.append(_name_equation(raw, var, _NAMES[place], eqn))
                outs.append(raw)
            else:
                outs.append(var)
        return [eqn.replace(outvars=outs), *extra] if extra else [eqn]


def _name_equation(source: Any, target: Any, name: str, like: Any) -> Any:
    template = _template(name)
    return like.replace(
        primitive=template.primitive,
        params=template.params,
        effects=template.effects,
        invars=[source],
        outvars=[target],
    )


@functools.lru_cache
def _template(name: str) -> Any:
    """An equation that gives a value a name; traced once, since tracing it is most of what marking costs."""
    [eqn] = jax.make_jaxpr(lambda x: checkpoint_name(x, name))(jax.ShapeDtypeStruct((), jax.numpy.float32)).eqns
    return eqn
