"""Which values of a program go through device memory, once a compiler has fused what every compiler fuses.

The model, on equations in program order (calls are inlined):

- Elementwise equations, broadcasts, conversions and slices are fused into what uses them. Reductions are fused with what
  they reduce, and write their result. Everything else (matmuls, sorts, gathers, loops ...) is a kernel of its own: it reads
  its operands from memory and writes its results to it. Reshapes and transposes are views.
- A kernel begins where a reduction or another kernel before it must have ended: fused equations of the same depth of such
  dependencies, in the same half of the step (the forward pass, and what comes after it), are in one, and it reads a value
  once.
- A fused value that a kernel of its own uses is written. One that only fused kernels use is written if that moves fewer
  bytes than making it again in each of them, from what is in memory. So the inside of an activation function is never
  written, and the residual stream of a transformer is.
- Where ``fused_matmuls`` (a TPU's compiler), a matmul makes its operands as fused kernels do, and what one fused kernel
  alone does with its result is part of it.
- What no output needs does not exist.

It is optimistic where a kernel reads a value once however many cores share the work, and where layouts cost nothing. Its
bytes for a GPT step of 2 layers (d 512, length 1024, batch 4, vocabulary 8192; jax 0.12.0), as a multiple of what the
compiled step's kernels read and write: H100 0.97, with a remat of every layer 1.06; v5e (``cost_analysis()``) 0.98 and
1.16; v5e with d 1024, batch 8 and a vocabulary of 32768, 1.14 and 1.13. For the steps of ``benchmarks/zoo.py`` on H100,
from a U-Net's 0.80 to an MLP's 1.25, median 0.87.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nexus_jax.costs import Kind

_MEMORY = -1  # among the kernels that use a value: one that reads it from memory


class Line(NamedTuple):
    """An equation of a flat program; values are numbers.

    Attributes:
        kind: what a compiler makes of it.
        ins, outs: the values that it takes and makes; of a view or a barrier, one for one.
        late: whether it runs after the forward pass.
        moved: bytes that it reads and writes, if it is a kernel of its own.
        effects: whether it must run even if nothing needs what it makes.
    """

    kind: Kind
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    late: bool
    moved: tuple[int, int] = (0, 0)
    effects: bool = False


def traffic(
    lines: Sequence[Line], sizes: Sequence[int], outs: Iterable[int], fused_matmuls: bool = False
) -> list[tuple[int, int] | None]:
    """Bytes that each line reads from memory and writes to it; None for a line that nothing needs.

    Args:
        lines: in order; values that no line makes are in memory from the start.
        sizes: bytes of each value.
        outs: the values that the program returns.
        fused_matmuls: whether matmuls are fused with what is around them.
    """
    if not fused_matmuls:
        lines = [line._replace(kind="kernel") if line.kind == "matmul" else line for line in lines]
    kernels = _kernels(lines, len(sizes))
    return _Traffic(sizes, _users(lines, kernels, len(sizes), outs)).run(lines, kernels)


def _kernels(lines: Sequence[Line], n: int) -> list[int]:
    """The kernel of each line: by depth and half of the step if it is fused, a number below -1 if it is a matmul."""
    ready = [0] * n
    kernels = []
    for number, line in enumerate(lines):
        depth = max([ready[i] for i in line.ins], default=0)
        kernels.append(-2 - number if line.kind == "matmul" else 2 * depth + line.late)
        if line.kind in _ALIASES:
            for i, o in zip(line.ins, line.outs, strict=True):
                ready[o] = ready[i]
        else:
            for o in line.outs:
                ready[o] = depth + (line.kind in ("reduce", "kernel", "matmul"))
    return kernels


_ALIASES = ("view", "barrier")


def _users(lines: Sequence[Line], kernels: Sequence[int], n: int, outs: Iterable[int]) -> list[set[int]]:
    """The kernels that use each value."""
    users: list[set[int]] = [set() for _ in range(n)]
    for o in outs:
        users[o].add(_MEMORY)
    for line, kernel in zip(reversed(lines), reversed(kernels), strict=True):
        if line.kind == "view":
            for i, o in zip(line.ins, line.outs, strict=True):
                users[i] |= users[o]
        elif line.effects or any(users[o] for o in line.outs):
            user = _MEMORY if line.kind in ("barrier", "kernel") else kernel
            for i in line.ins:
                users[i].add(user)
    return users


class _Traffic:
    """Where each value is: in memory under a number, or made of such values when it is used."""

    def __init__(self, sizes: Sequence[int], users: list[set[int]]) -> None:
        self.sizes, self.users = sizes, users
        self.leaves: list[frozenset[int]] = [frozenset((v,)) for v in range(len(sizes))]
        self.seen: set[tuple[int, int]] = set()
        self.unwritten: dict[int, int] = {}  # results of matmuls: the kernel that is part of the matmul

    def run(self, lines: Sequence[Line], kernels: Sequence[int]) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for line, kernel in zip(lines, kernels, strict=True):
            if line.kind in _ALIASES:
                for i, o in zip(line.ins, line.outs, strict=True):
                    self.leaves[o] = self.leaves[i]
            needed = line.effects or any(self.users[o] for o in line.outs)
            found.append(self.line(line, kernel) if needed else None)
        return found

    def line(self, line: Line, kernel: int) -> tuple[int, int]:
        if line.kind in _ALIASES:
            return 0, 0
        if line.kind == "kernel":
            return line.moved
        if line.kind == "slice":  # what a kernel of its own uses is copied; the rest is read in place, so much of it
            copied = sum(self.sizes[o] for o in line.outs if _MEMORY in self.users[o])
            return copied, copied
        leaves = frozenset().union(*(self.leaves[i] for i in line.ins))
        if line.kind == "reduce":
            return self.moved(leaves, kernel, sum(self.sizes[o] for o in line.outs))
        [out] = line.outs
        if line.kind == "matmul":
            [user, *others] = self.users[out]
            if not others and user >= 0:
                self.unwritten[out] = user
                return self.moved(leaves, kernel, 0)
            return self.moved(leaves, kernel, self.sizes[out])
        if self.worth_writing(out, leaves, kernel):
            return self.moved(leaves, kernel, self.sizes[out])
        self.leaves[out] = leaves
        return 0, 0

    def worth_writing(self, out: int, leaves: frozenset[int], kernel: int) -> bool:
        users = self.users[out]
        if _MEMORY in users:
            return True
        again = len(users) * sum(self.sizes[v] for v in leaves)
        once = sum(self.sizes[v] for v in leaves) + self.sizes[out] * (1 + len(users - {kernel}))
        return again > once

    def moved(self, leaves: frozenset[int], kernel: int, written: int) -> tuple[int, int]:
        """What a kernel reads and writes because of one line: what it has not read yet, and what the line makes."""
        read = 0
        for v in leaves:
            if (kernel, v) in self.seen or self.unwritten.get(v) == kernel:
                continue
            self.seen.add((kernel, v))
            read += self.sizes[v]
            if v in self.unwritten:  # another kernel needs it, by way of a value that is made again there
                del self.unwritten[v]
                written += self.sizes[v]
        return read, written
