"""What one equation of a jaxpr computes and moves, by tables that can be read.

====================================  =================================================================================
equations                             FLOPs
====================================  =================================================================================
``dot_general``, ragged dots          2 a multiply-add (8 if complex); a ragged row meets one group's matrix
``conv_general_dilated``              2 a multiply-add of an output element and a tap on the image. Zeros do not count,
                                      of the padding or between the elements (``lhs_dilation``): so a convolution and
                                      its two gradients cost the same. XLA counts so; textbooks count the padding
``fft``                               5 N log2 N a complex transform, half of it a real one; N over all its dimensions
elementwise, integers too             1 per output element; ``exp tanh div rsqrt ...`` also 1: devices differ too much
                                      in them, and nearly always their bytes take longer
reductions, ``argmax``, cumulative    1 per input element; ``reduce`` with a function of its own, the function's each
``reduce_window``, pooling            1 per output element and element of the window; the gradient 1 per the same pairs
``scatter-add`` and the like          1 per element of the updates
``sort``, ``top_k``                   n log2 n comparisons a row and key; n log2 k
``cholesky lu qr triangular_solve``   n^3/3, mn^2 - n^3/3, 4mn^2 - 4n^3/3 with Q formed, n^2 a right-hand side (Golub and
                                      Van Loan, Matrix Computations, 4th ed., sections 4.2, 3.2, 5.2, 3.1)
Threefry random bits                  60 integer operations a 32-bit word: for a pair of words 20 rounds of 5 and 5 key
                                      injections (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011)
``psum`` and other sums of devices    1 per element and device; the network is not modelled
``pallas_call``                       what its ``cost_estimate`` says; unknown without one
moving, converting, reshaping         0
====================================  =================================================================================

What is in no row is not guessed: :func:`flops_of` returns None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nexus_jax.policy.rules import nbytes


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


MATMULS = _set("dot_general conv_general_dilated ragged_dot ragged_dot_general")

# Another name for the same bytes: nothing is computed or moved. A transpose is one too: compilers choose layouts.
_VIEWS = _set(
    "reshape squeeze expand_dims transpose name copy copy_p stop_gradient sharding_constraint mesh_cast reshard pvary "
    "pcast layout_constraint bitcast_convert_type random_wrap random_unwrap device_put with_memory_space_constraint"
)

# As a view, but the value is in memory on both sides.
_BARRIERS = _set("optimization_barrier")

# An output element from an element of each input, one operation: what every compiler fuses.
_ELEMENTWISE = _set(
    "abs acos acosh add add_any add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz "
    "complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac "
    "imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi ne neg nextafter not "
    "one_minus_square or polygamma polynomial population_count pow real regularized_incomplete_beta rem round rsqrt "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor zeta"
)

# Fused like those, and nothing is computed.
_MOVES = _set(
    "broadcast_in_dim broadcast_to tile zeros_like convert_element_type reduce_precision iota pad rev axis_index "
    "platform_index empty empty2"
)

# Fused too: an element of the input that no output element is made of is not read.
_SLICES = _set("slice dynamic_slice split unstack")

_COPIES = _set(
    "concatenate stack dynamic_update_slice gather scatter all_gather all_gather_invariant all_gather_reduced all_to_all "
    "ppermute pbroadcast ragged_all_to_all create_token after_all debug_callback debug_print"
)

_REDUCTIONS = _set("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin reduce")

_CUMULATIVE = _set("cumsum cumprod cummax cummin cumlogsumexp")

_SCATTERS = _set(
    "scatter-add scatter-sub scatter-mul scatter-min scatter-max scatter_add scatter_sub scatter_mul scatter_min scatter_max"
)

_SUMS_OF_DEVICES = _set("psum psum_invariant pmax pmin reduce_scatter unreduced_psum unreduced_reduce_scatter")

Kind = Literal["view", "barrier", "fused", "slice", "reduce", "matmul", "kernel"]


def kind_of(eqn: Any) -> Kind:
    """What a compiler makes of an equation: see :mod:`nexus_jax.fusion`."""
    name = eqn.primitive.name
    if name in _VIEWS:
        return "view"
    if name in _ELEMENTWISE or name in _MOVES:
        return "fused"
    if name in _SLICES:
        return "slice"
    if name in _REDUCTIONS:
        return "reduce"
    if name in MATMULS:
        return "matmul"
    if name in _BARRIERS:
        return "barrier"
    return "kernel"


# --- FLOPs ---------------------------------------------------------------------------------------------------------


def flops_of(eqn: Any) -> int | None:
    """FLOPs of one run of an equation that has no body; None where the table has no row for it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.ones((4, 8))
        >>> [flops_of(eqn) for eqn in jax.make_jaxpr(lambda x: jnp.tanh(x) @ x.T)(x).jaxpr.eqns]
        [32, 0, 256]
    """
    name = eqn.primitive.name
    if name in _TABLE:
        return _TABLE[name](eqn)
    if name in _ELEMENTWISE:
        return size(eqn.outvars[0])
    if name in _REDUCTIONS or name in _CUMULATIVE:
        return size(eqn.invars[0])
    if name in _SCATTERS:
        return size(eqn.invars[2])
    if name in _SUMS_OF_DEVICES:
        return sum(map(size, eqn.invars))
    return 0 if name in _NOTHING else None


_NOTHING = _VIEWS | _BARRIERS | _MOVES | _SLICES | _COPIES


def size(var: Any) -> int:
    """Elements of a value; 0 of what is no array."""
    return math.prod(getattr(var.aval, "shape", (0,)))


def _dot(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    return _multiply_add(eqn) * size(eqn.outvars[0]) * inner


def _multiply_add(eqn: Any) -> int:
    return 8 if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.complexfloating) else 2


def _ragged_dot(eqn: Any) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    flops = _multiply_add(eqn) * size(eqn.outvars[0]) * inner
    if set(numbers.lhs_ragged_dimensions) & set(contracting):  # the groups share it out: each output is of one of them
        flops //= max(eqn.invars[2].aval.shape[-1], 1)
    return flops


def _convolution(eqn: Any) -> int:
    p = eqn.params
    numbers, kernel, out = p["dimension_numbers"], eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    image = eqn.invars[0].aval.shape
    pairs = 1
    spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for i, (n, k, o) in enumerate(spatial):
        pitch, low = p["lhs_dilation"][i], p["padding"][i][0]
        windows, taps = (out[o], p["window_strides"][i]), (kernel[k], p["rhs_dilation"][i])
        (few, far), (many, near) = sorted((windows, taps))
        end = (image[n] - 1) * pitch + 1
        pairs *= sum(_on_the_image(many, near, m * far - low, end, pitch) for m in range(few))
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return _multiply_add(eqn) * batch * features * kernel[numbers.rhs_spec[1]] * pairs


def _on_the_image(n: int, step: int, start: int, end: int, pitch: int) -> int:
    """How many of ``start + i * step``, ``i < n``, are in ``range(0, end, pitch)``: no padding, and no dilation's zero."""
    first, last = max(0, -(start // step)), min(n, -((start - end) // step))
    period = pitch // math.gcd(step, pitch)
    for i in range(first, min(last, first + period)):
        if (start + i * step) % pitch == 0:
            return 1 + (last - 1 - i) // period
    return 0


def _fft(eqn: Any) -> int:
    n = math.prod(eqn.params["fft_lengths"])
    kind = eqn.params["fft_type"].name
    transforms = size(eqn.outvars[0] if kind == "IRFFT" else eqn.invars[0]) // max(n, 1)
    return round((2.5 if "RFFT" in kind else 5) * n * math.log2(max(n, 1)) * transforms)


def _sort(eqn: Any) -> int:
    n = eqn.invars[0].aval.shape[eqn.params["dimension"]]
    return size(eqn.invars[0]) * _log2(n) * eqn.params["num_keys"]


def _top_k(eqn: Any) -> int:
    return size(eqn.invars[0]) * max(_log2(eqn.params["k"]), 1)


def _log2(n: int) -> int:
    return math.ceil(math.log2(n)) if n > 1 else 0


def _pooling(eqn: Any) -> int:
    return size(eqn.outvars[0]) * math.prod(eqn.params["window_dimensions"])


def _pooling_gradient(eqn: Any) -> int:
    return size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


def _reduce(eqn: Any) -> int | None:
    each = _of_function(eqn)
    return None if each is None else each * size(eqn.invars[0])


def _reduce_window(eqn: Any) -> int | None:
    each = _of_function(eqn)
    return None if each is None else each * _pooling(eqn)


def _of_function(eqn: Any) -> int | None:
    """FLOPs of the function of a generic reduction."""
    jaxpr = eqn.params["jaxpr"]
    found = [flops_of(e) for e in getattr(jaxpr, "jaxpr", jaxpr).eqns]
    return None if None in found else sum(f for f in found if f is not None)


def _matrices(eqn: Any) -> tuple[int, int, int]:
    """How many matrices, and the longer and the shorter of their sides."""
    *batch, m, n = eqn.invars[0].aval.shape
    return math.prod(batch), max(m, n), min(m, n)


def _cholesky(eqn: Any) -> int:
    batch, n, _ = _matrices(eqn)
    return batch * n**3 // 3


def _lu(eqn: Any) -> int:
    batch, m, n = _matrices(eqn)
    return batch * (m * n * n - n**3 // 3)


def _qr(eqn: Any) -> int:
    batch, m, n = _matrices(eqn)
    return batch * (4 * m * n * n - 4 * n**3 // 3)


def _triangular_solve(eqn: Any) -> int:
    return size(eqn.invars[1]) * eqn.invars[0].aval.shape[-1]


def _random_bits(eqn: Any) -> int | None:
    """Two words a key, else as many as the output has; other generators than Threefry are the device's own."""
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    keys = [a for a in avals if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
    if not keys or not all("fry" in str(a.dtype) for a in keys):
        return None
    return 60 * math.ceil(nbytes(eqn.outvars[0].aval) / 4)


_TABLE: dict[str, Callable[[Any], int | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
    "fft": _fft,
    "sort": _sort,
    "top_k": _top_k,
    "approx_top_k": _top_k,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _pooling),
    **dict.fromkeys(("select_and_scatter_add", "select_and_gather_add"), _pooling_gradient),
    "reduce": _reduce,
    "reduce_window": _reduce_window,
    "cholesky": _cholesky,
    "lu": _lu,
    "qr": _qr,
    "triangular_solve": _triangular_solve,
    "threefry2x32": lambda eqn: 60 * sum(map(size, eqn.outvars)),
    **dict.fromkeys(("random_bits", "random_seed", "random_fold_in", "random_split"), _random_bits),
    "pallas_call": lambda eqn: getattr(eqn.params.get("cost_estimate"), "flops", None),
}


# Equations in the table: programs among their parameters are the functions that they apply, not bodies that they run.
KNOWN = _NOTHING | _ELEMENTWISE | _REDUCTIONS | _CUMULATIVE | _SCATTERS | _SUMS_OF_DEVICES | _TABLE.keys()


# --- bytes and precision -------------------------------------------------------------------------------------------


def bytes_of(eqn: Any) -> tuple[int, int]:
    """Bytes that an equation reads and writes as a kernel of its own. Updates are made in place.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, i = jnp.ones((1000, 8)), jnp.array([3, 5])
        >>> [bytes_of(eqn) for eqn in jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr.eqns][-1]
        (64000, 4000000)
    """
    name = eqn.primitive.name
    ins = [nbytes(v.aval) for v in eqn.invars]
    out = sum(nbytes(v.aval) for v in eqn.outvars)
    if name == "gather":
        return out + ins[1], out
    if name == "dynamic_update_slice":
        return ins[1], ins[1]
    if name == "scatter":
        return ins[1] + ins[2], ins[2]
    if name in _SCATTERS:
        return ins[1] + 2 * ins[2], ins[2]
    if name == "pallas_call" and eqn.params.get("cost_estimate") is not None:
        moved = eqn.params["cost_estimate"].bytes_accessed
        return (max(moved - out, 0), min(moved, out)) if moved else (sum(ins), out)
    return sum(ins), out


def dtype_of(eqn: Any) -> str:
    """The widest type among what an equation takes; of what it makes, where it takes nothing."""
    found = {v.aval.dtype for v in eqn.invars or eqn.outvars if hasattr(v.aval, "dtype")}
    return _name(max(found, key=lambda dtype: dtype.itemsize)) if found else ""


_name = functools.cache(str)  # numpy takes its time to name a type


def passes_of(eqn: Any) -> int:
    """How many bfloat16 (TF32 on a GPU) passes a float32 matmul takes by its precision: 1, ``HIGH`` 3, ``HIGHEST`` 6.

    The numbers are those of https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision on a TPU.
    """
    precision = eqn.params.get("precision")
    if precision is None or eqn.primitive.name not in MATMULS or dtype_of(eqn) != "float32":
        return 1
    text = str(precision).upper()
    if "HIGHEST" in text or "_X6" in text or text.endswith("F32_F32_F32"):
        return 6
    return 3 if "HIGH" in text or "_X3" in text else 1
