"""What each compiler does with memory: the few rules in which they differ, with what they were seen in."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nexus_jax.peak.graph import Graph, Node, Value, inside

MIB = 2**20

# Nothing of these is kept unless something that cannot compute it needs it: they are fused into what reads them.
_FUSIBLE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type broadcast_in_dim cbrt ceil
    clamp concatenate convert_element_type copy cos cosh digamma div dynamic_slice eq erf erf_inv erfc exp exp2
    expm1 floor full ge gt imag integer_pow iota is_finite le lgamma log log1p logistic lt max min mul ne neg
    nextafter not or pad population_count pow real reduce_precision rem rev round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt square sub tan tanh transpose xor
    clz one_minus_square mul_add reshape squeeze expand_dims stop_gradient random_bits random_fold_in
    random_seed random_split threefry2x32 broadcast
"""
FUSIBLE = frozenset(_FUSIBLE.split())
# Their operands may be computed on the way in, their result is written.
_REDUCTIONS = """
    argmax argmin reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window
    reduce_window_max reduce_window_min reduce_window_sum reduce_xor select_and_gather_add
    select_and_scatter_add
"""
REDUCTIONS = frozenset(_REDUCTIONS.split())
CONTRACTIONS = {"dot_general", "conv_general_dilated"}
# Too slow to do twice, says the GPU's cost model.
_EXPENSIVE = """
    acos asin atan2 cos digamma erf erf_inv erfc lgamma pow sin tan tanh random_bits threefry2x32
"""
EXPENSIVE = frozenset(_EXPENSIVE.split())
# They write into their first operand where nothing else reads it.
IN_PLACE = {
    "scatter",
    "scatter-add",
    "scatter_add",
    "scatter_mul",
    "scatter_min",
    "scatter_max",
    "dynamic_update_slice",
}
LOOPS = {"scan", "while", "cond"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """The rules of one compiler, as seen in the buffer assignments and schedules that it wrote (jax 0.12, libtpu 0.0.50).

    Attributes:
        tiled: the two minor dimensions of a value are padded to tiles of 8 x 128.
        fused_operands: matmuls compute their operands on the way in; else these are written first.
        fused_results: elementwise operations on a matmul's result are done on the way out, each being the only reader.
        keeps_expensive: what is slow to compute is written where two kernels read it.
        fused_gather: a gather computes what it reads on the way; else its operand is written first.
        one_hot_scatter: a scatter of scalars (the gradient of ``take_along_axis``) is a comparison with an iota.
        fused_softmax: a log-softmax is one kernel with its maximum, and writes what it subtracted that from.
        maximum_of_halves: but not of bfloat16 logits, whose maximum is taken before they are widened.
        softmax_apart: and does so beside what it reads, not into its place.
        fused_sums: what reads the same values as a sum, and does not need it, is one kernel with it.
        outputs_reused: the memory of a result serves for temporaries until the result is written.
        stacked_last: in a loop's body, what only its stacked results need runs last.
        greedy: what frees memory for what it makes runs first; else the best of some orders is taken.
        sunk_broadcasts: a broadcast that a loop reads as a constant is done in the loop.
        converted_stacks: float32 weights that scans only multiply are converted to bfloat16 before the first, as stacks.
        reports_holes_twice: the reported temporaries hold the holes of the heap twice.
        fast_bytes: memory beside the device's (VMEM) in which the compiler keeps what is used soon.
        bandwidth, flops: of the device, in bytes/s and in FLOP/s of matmuls, by which it chooses what to keep there.
        split_k: matmuls with few results and long sums are done in parts, each with partial sums of its own.
        descriptor_bytes: what a descriptor takes in the heap, all the time: of a copy to VMEM or back, of several results.
    """

    tiled: bool
    fused_operands: bool
    fused_results: bool
    keeps_expensive: bool
    fused_gather: bool
    one_hot_scatter: bool
    fused_softmax: bool
    maximum_of_halves: bool
    softmax_apart: bool
    fused_sums: bool
    outputs_reused: bool
    stacked_last: bool
    greedy: bool
    sunk_broadcasts: bool
    converted_stacks: bool
    reports_holes_twice: bool
    fast_bytes: int = 0
    bandwidth: float = 1.0
    flops: float = 1.0
    descriptor_bytes: int = 0
    split_k: bool = False

    def scratch(self, node: Node) -> int:
        """Bytes that an operation needs while it runs, beside what it reads and writes."""
        return _partial_sums(node) if self.split_k and node.op == "dot_general" else 0

    def sizer(self, graph: Graph | None = None, halved: bool = True) -> Callable[[Value], int]:
        """Bytes of a value in this device's layout; of arguments and results, without a graph.

        Args:
            halved: whether float32 values that only matmuls read are kept as bfloat16; what is fused is decided before.
        """
        if not self.tiled:
            return lambda value: _up(value.size, 256)
        images = _images(graph) if graph is not None else {}

        def size(value: Value) -> int:
            shape = value.shape
            image = images.get(shape) or images.get((shape[0], math.prod(shape))) if len(shape) > 2 else None
            dtype = _HALF if graph is not None and halved and only_multiplied(value) else value.dtype
            return padded(shape, dtype, image)

        return size


_HALF = np.dtype("float16")


def only_multiplied(value: Value) -> bool:
    """Whether a float32 value goes into matmuls only, which read bfloat16 at the default precision; or is summed beside.

    Also through barriers and into the bodies of scans: what a checkpoint saves is kept as bfloat16, and a stack too.
    """
    return value.dtype == np.float32 and value.node is not None and multiplied(value) == {True}


def multiplied(value: Value) -> set[bool]:
    """Of each use of a value, whether it is a matmul that reads bfloat16; sums do not count."""
    found: set[bool] = set()
    for user in value.users:
        if user.op in CONTRACTIONS and _is_default(user.params.get("precision")):
            found.add(True)
        elif user.op in ("barrier", "scan"):
            for v in inside(user, value):
                found |= multiplied(v)
        elif user.op not in REDUCTIONS:
            found.add(False)
    return found


def narrowed(value: Value) -> bool:
    """Whether nothing but bfloat16 is made of float32 values, by a matmul or by the model itself."""
    small = lambda u: u.op == "convert_element_type" and u.outs[0].dtype.itemsize == 2
    uses = [(u, inside(u, value)) for u in value.users]
    kept = lambda u, inner: all(map(narrowed, inner)) if inner else small(u) or u.op in CONTRACTIONS
    return value.dtype == np.float32 and bool(uses) and all(kept(u, inner) for u, inner in uses)


def _is_default(precision: Any) -> bool:
    kinds = precision if isinstance(precision, tuple) else (precision,)
    return all(k is None or k == jax.lax.Precision.DEFAULT for k in kinds)


_TILE, _PROCESSORS, _LEAST_SUM = 128, 128, 256


def _partial_sums(node: Node) -> int:
    """A GPU's matmul is cut into tiles of 128 x 128; sums are split until every processor has one."""
    sums, (_, batch) = _sums(node), node.params["dimension_numbers"]
    shape = node.params["lhs_shape"]
    batches = math.prod(shape[d] for d in batch[0])
    rows = math.prod(shape) // max(sums * batches, 1)
    results = math.prod(node.outs[0].shape)
    columns = results // max(rows * batches, 1)
    tiles = batches * -(-rows // _TILE) * -(-columns // _TILE)
    split = 1
    while tiles * split < _PROCESSORS and sums // (2 * split) >= _LEAST_SUM:
        split *= 2
    return split * results * 4 if split > 1 else 0


def _sums(node: Node) -> int:
    """How many products one result of a matmul is the sum of."""
    (contracted, _), _ = node.params["dimension_numbers"]
    return math.prod(node.params["lhs_shape"][d] for d in contracted)


def flops(node: Node) -> int:
    """Of a matmul or a convolution."""
    results = math.prod(node.outs[0].shape)
    if node.op == "dot_general":
        return 2 * results * _sums(node)
    kernel = node.params["rhs_shape"]
    return 2 * results * math.prod(kernel) // kernel[node.params["dimension_numbers"].rhs_spec[0]]


def _images(graph: Graph) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Batch and features of what convolutions read and write, by shape, and by batch and number of elements.

    A convolution wants these two dimensions in its tiles, and all values of an image's size are laid out as it is.
    """
    found = {}
    for node in _all_nodes(graph):
        if node.op == "conv_general_dilated":
            numbers = node.params["dimension_numbers"]
            for value, spec in ((node.ins[0], numbers.lhs_spec), (node.outs[0], numbers.out_spec)):
                shape = value.shape
                if len(shape) == len(spec):
                    found[shape] = found[shape[0], math.prod(shape)] = tuple(shape[d] for d in sorted(spec[:2]))
    return found


def _all_nodes(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        for body in node.bodies:
            yield from _all_nodes(body)


def padded(shape: tuple[int, ...], dtype: Any, tiled: tuple[int, ...] | None = None) -> int:
    """Bytes on a TPU: two dimensions, the compiler's choice, are cut into tiles of 8 x 128.

    Args:
        tiled: the sizes of the dimensions among which it chooses; of an image, batch and features.

    Example:
        >>> import numpy as np
        >>> padded((16, 128, 128, 32), np.dtype("int16")) // 2**20
        16
        >>> padded((16, 128, 128, 32), np.dtype("int16"), tiled=(16, 32)) // 2**20
        64
    """
    itemsize = getattr(dtype, "itemsize", 4)
    count = math.prod(shape)
    if len(shape) < 2 or count * itemsize <= 4096:
        return _up(count * itemsize, 512)
    size = lambda pair: round(count * _up(pair[0], 128) * _up(pair[1], 8 if pair[1] > 4 else 4) / math.prod(pair))
    best = min(map(size, itertools.permutations(tiled or shape, 2)))
    given = size((shape[-1], shape[-2])) if tiled is None else best
    return (given if given < _WORTH * best else best) * itemsize


_WORTH = (
    1.1  # as often as much must another layout take less; seen: 1.05 is kept (145 tokens in tiles of 8), 1.13 is not
)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


GPU = Backend(
    tiled=False,
    fused_operands=False,
    fused_results=False,
    keeps_expensive=True,
    fused_gather=True,
    one_hot_scatter=False,
    fused_softmax=True,
    maximum_of_halves=False,
    softmax_apart=False,
    fused_sums=False,
    outputs_reused=True,
    stacked_last=True,
    greedy=False,
    sunk_broadcasts=False,
    converted_stacks=False,
    reports_holes_twice=False,
    split_k=True,
)
TPU = Backend(
    tiled=True,
    fused_operands=True,
    fused_results=True,
    keeps_expensive=False,
    fused_gather=False,
    one_hot_scatter=True,
    fused_softmax=True,
    maximum_of_halves=True,
    softmax_apart=True,
    fused_sums=True,
    outputs_reused=False,
    stacked_last=False,
    greedy=True,
    sunk_broadcasts=True,
    converted_stacks=True,
    reports_holes_twice=True,
    fast_bytes=112 * MIB,  # of v5e's 128 MiB
    bandwidth=819e9,
    flops=197e12,
    descriptor_bytes=16 * 1024,
)
