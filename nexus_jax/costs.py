"""FLOPs of one equation of a jaxpr, by a table that can be read.

====================================  =================================================================================
equations                             FLOPs
====================================  =================================================================================
``dot_general``, ragged dots          2 per multiply-add (8 if complex); a ragged row meets one group's matrix
``conv_general_dilated``              2 per multiply-add of an output element and a tap: taps in the padding count, as in
                                      every textbook formula; the zeros that ``lhs_dilation`` puts between elements do
                                      not. So a strided convolution and its two gradients cost the same (up to the border)
``fft``                               5 N log2 N a complex transform, half of that a real one (N over all its dimensions)
elementwise, integers too             1 per output element; ``exp``, ``tanh``, ``div``, ``rsqrt`` ... also 1: devices differ
                                      too much in them, and bytes bound them
reductions, ``argmax``, cumulative    1 per input element
``reduce_window``, pooling            1 per output element and window element; its gradient 1 per the same pairs
``scatter-add`` and the like          1 per element of the updates
``sort``, ``top_k``                   n log2 n comparisons a row and key; n log2 k
``cholesky lu qr triangular_solve``   n^3/3, mn^2 - n^3/3, 2mn^2 - 2n^3/3, n^2 a right-hand side (Golub and Van Loan,
                                      Matrix Computations, 4th ed., algorithms 4.2.1, 3.2.1, 5.2.1, 3.1.1)
Threefry random bits                  60 integer operations a 32-bit word (20 rounds of 5 and 5 key injections a pair)
``psum`` and other summing            1 per element and participant; the network is not modelled
moving, converting, reshaping         0
====================================  =================================================================================

What is in no row is not guessed: :func:`flops_of` returns None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

MATMULS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"})

# Another name for the same bytes: nothing is computed or moved.
VIEWS = frozenset(
    "reshape squeeze expand_dims transpose name copy copy_p stop_gradient optimization_barrier sharding_constraint "
    "mesh_cast reshard pvary pcast layout_constraint bitcast_convert_type random_wrap random_unwrap axis_index "
    "create_token after_all debug_callback debug_print empty empty2 device_put split".split()
)

# One output element from one element of each input: what every compiler fuses.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz "
    "complex conj cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac "
    "imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul ne neg nextafter not "
    "one_minus_square or polygamma polynomial population_count pow real reduce_precision regularized_incomplete_beta rem "
    "round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh "
    "xor zeta".split()
)

# Fused like the elementwise ones, and nothing is computed.
MOVES = frozenset("broadcast_in_dim convert_element_type iota pad slice rev to_edtype from_edtype".split())

# Copies of their own.
COPIES = frozenset(
    "concatenate dynamic_slice dynamic_update_slice gather scatter all_gather all_gather_invariant all_gather_reduced "
    "all_to_all ppermute pbroadcast ragged_all_to_all get swap".split()
)

REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin cumsum cumprod cummax "
    "cummin cumlogsumexp".split()
)

_SCATTERS = frozenset("scatter-add scatter-mul scatter-min scatter-max scatter_add scatter_mul scatter-sub".split())
_SUMS = frozenset("psum psum2 psum_invariant pmax pmin reduce_scatter psum_scatter unreduced_psum".split())


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
    if name in VIEWS or name in MOVES or name in COPIES:
        return 0
    if name in ELEMENTWISE:
        return size(eqn.outvars[0])
    if name in REDUCTIONS:
        return size(eqn.invars[0])
    if name in _SCATTERS:
        return size(eqn.invars[2])
    if name in _SUMS:
        return sum(size(v) for v in eqn.invars)
    return None


def size(var: Any) -> int:
    """Elements of a value; 0 of what is no array."""
    return math.prod(getattr(var.aval, "shape", (0,)))


def nbytes(var: Any) -> int:
    """Bytes of a value; 0 of what is no array."""
    dtype = getattr(var.aval, "dtype", None)
    if dtype is None:
        return 0
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return size(var) * 8
    try:
        return math.ceil(size(var) * jax.dtypes.itemsize_bits(dtype) / 8)
    except (TypeError, ValueError):
        return size(var) * np.dtype(dtype).itemsize


def _dot(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    return _per_madd(eqn) * size(eqn.outvars[0]) * inner


def _per_madd(eqn: Any) -> int:
    return 8 if jax.dtypes.issubdtype(eqn.outvars[0].aval.dtype, np.complexfloating) else 2


def _ragged_dot(eqn: Any) -> int:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = dims.dot_dimension_numbers
    inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracting)
    groups = eqn.invars[2].aval.shape[-1]
    # a ragged contraction is shared out among the groups that the output lists one by one
    shared = groups if any(d in contracting for d in dims.lhs_ragged_dimensions) else 1
    return _per_madd(eqn) * size(eqn.outvars[0]) * inner // max(shared, 1)


def _conv(eqn: Any) -> int:
    p = eqn.params
    numbers, kernel, out = p["dimension_numbers"], eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    pairs = 1
    for i, (o, k) in enumerate(zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)):
        hole, stride, low = p["lhs_dilation"][i], p["window_strides"][i], p["padding"][i][0]
        at = Counter(n * stride % hole for n in range(out[o]))
        pairs *= sum(at[(low - n * p["rhs_dilation"][i]) % hole] for n in range(kernel[k]))
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return _per_madd(eqn) * batch * features * kernel[numbers.rhs_spec[1]] * pairs


def _fft(eqn: Any) -> int:
    n = math.prod(eqn.params["fft_lengths"])
    kind = str(eqn.params["fft_type"])
    real = "RFFT" in kind.upper() or kind in ("2", "3")
    whole = eqn.outvars[0] if kind.upper().endswith("IRFFT") or kind == "3" else eqn.invars[0]
    transforms = size(whole) // n if n else 0
    return round((2.5 if real else 5) * n * math.log2(n) * transforms) if n > 1 else 0


def _sort(eqn: Any) -> int:
    n = eqn.invars[0].aval.shape[eqn.params["dimension"]]
    return size(eqn.invars[0]) * _log2(n) * eqn.params["num_keys"]


def _top_k(eqn: Any) -> int:
    return size(eqn.invars[0]) * max(_log2(eqn.params["k"]), 1)


def _log2(n: int) -> int:
    return math.ceil(math.log2(n)) if n > 1 else 0


def _windowed(eqn: Any) -> int:
    return size(eqn.outvars[0]) * math.prod(eqn.params["window_dimensions"])


def _windowed_gradient(eqn: Any) -> int:
    return size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"])


def _matrices(eqn: Any) -> tuple[int, int, int]:
    *batch, m, n = eqn.invars[0].aval.shape
    return math.prod(batch), m, n


def _cholesky(eqn: Any) -> int:
    batch, n, _ = _matrices(eqn)
    return batch * n**3 // 3


def _lu(eqn: Any) -> int:
    batch, m, n = _matrices(eqn)
    m, n = max(m, n), min(m, n)
    return batch * (m * n * n - n**3 // 3)


def _qr(eqn: Any) -> int:
    batch, m, n = _matrices(eqn)
    m, n = max(m, n), min(m, n)
    return batch * (2 * m * n * n - 2 * n**3 // 3)


def _triangular_solve(eqn: Any) -> int:
    return size(eqn.invars[1]) * eqn.invars[0].aval.shape[-1]


def _random_bits(eqn: Any) -> int | None:
    keys = [v.aval.dtype for v in eqn.invars if jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key)]
    if not all("fry" in str(dtype) for dtype in keys):
        return None
    out = eqn.outvars[0]
    return 60 * (2 * size(out) if keys and out.aval.dtype == keys[0] else math.ceil(nbytes(out) / 4))


_TABLE: dict[str, Callable[[Any], int | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
    "fft": _fft,
    "sort": _sort,
    "top_k": _top_k,
    "approx_top_k": _top_k,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _windowed),
    **dict.fromkeys(("select_and_scatter_add", "select_and_gather_add"), _windowed_gradient),
    "cholesky": _cholesky,
    "lu": _lu,
    "geqrf": _qr,
    "triangular_solve": _triangular_solve,
    "threefry2x32": lambda eqn: 60 * sum(size(v) for v in eqn.outvars),
    **dict.fromkeys(("random_bits", "random_seed", "random_fold_in", "random_split"), _random_bits),
}
