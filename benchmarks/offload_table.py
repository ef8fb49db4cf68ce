"""What offloading takes on targets that nobody here owns: the 12-layer GPT of docs/offload.md, unrolled, scanned, in nnx.

    python benchmarks/offload_table.py [--targets h200,v5e] [--shapes unrolled,scanned,nnx,nnx-scanned] [--out benchmarks/results]

Nothing runs. Bytes are those that the compiler sets aside, read from its buffer assignment: libtpu's own sums count
fragmented memory twice. The distance of a copy is how many matmuls stand between its start and its end in the
compiler's schedule: nothing hides a copy with none.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import statistics
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import nexus_jax as nj
from nexus_jax import report
from nexus_jax.measure import measurement
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import compile_all, find_target

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import gpt_table
import models

MB = 1.0  # smallest residual that is moved
AHEAD = (0, 1, 2, 3)
ROWS = {
    "none": ("none", None),
    "full remat": ("all", None),
    "heavy_ops": ("heavy_ops", None),
    "JAX's policy": ("offload_dot_with_no_batch_dims", None),
    **{f"ours, prefetch_ahead={n}": ("none", n) for n in AHEAD},
    **{f"ours with heavy_ops, prefetch_ahead={n}": ("heavy_ops", n) for n in AHEAD},
}
# In a scan, copies are tied to its steps, whatever prefetch_ahead says.
SAME = [name for name, (_, ahead) in ROWS.items() if ahead in (0, 2, 3)]
NNX = ("none", "full remat", "ours, prefetch_ahead=0", "ours with heavy_ops, prefetch_ahead=1")
SCANNED = tuple(r for r in ROWS if r not in SAME)
SHAPES = {"unrolled": tuple(ROWS), "scanned": SCANNED, "nnx": NNX, "nnx-scanned": SCANNED}


class Step(nn.Module):
    block: type

    @nn.compact
    def __call__(self, x, _):
        return self.block(gpt_table.SIZE["heads"], 0.0, gpt_table.SIZE["dtype"], name="block")(x), None


class Scanned(nn.Module):
    """The GPT with its blocks in one scan, parameters stacked."""

    layers: int = 12
    block: type = models.Block

    @nn.compact
    def __call__(self, tokens):
        d, dtype = gpt_table.SIZE["d"], gpt_table.SIZE["dtype"]
        embed = nn.Embed(gpt_table.SIZE["vocab"], d, dtype=dtype, name="embed")
        scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = scan(self.block, name="layers")(embed(tokens), None)
        return embed.attend(nn.LayerNorm(dtype=dtype, name="norm")(x))


class NNXScanned(models.NNXGPT):
    """The same in nnx."""

    def __init__(self, layers, *, rngs, **sizes):
        super().__init__(0, rngs=rngs, **sizes)
        d, heads, dtype = (gpt_table.SIZE[name] for name in ("d", "heads", "dtype"))
        make = nnx.vmap(lambda key: models.NNXBlock(d, heads, dtype=dtype, rngs=nnx.Rngs(key)))
        self.layers = make(jax.random.split(rngs.params(), layers))

    def __call__(self, tokens):
        x = self.embed(tokens)
        layers = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.embed.attend(self.norm(layers(x + self.pos[...].astype(x.dtype), self.layers)))


def nnx_scanned(policy, batch, length, layers):
    make = lambda: NNXScanned(layers, length=length, rngs=nnx.Rngs(0), **gpt_table.SIZE)
    return gpt_table.nnx_workload(nj.apply_selective_checkpointing(nnx.eval_shape(make), policy), batch, length)


def model_of(shape, policy, layers):
    plain = models.GPT(**gpt_table.SIZE, layers=layers) if shape == "unrolled" else Scanned(layers)
    return plain if policy == "none" else nj.apply_selective_checkpointing(plain, policy)


def workload(shape, row, layers, batch=8, length=1024):
    """A loss and its arguments as shapes."""
    policy, ahead = ROWS[row]
    if shape == "nnx":
        loss, args = gpt_table.flax_nnx(policy, batch, length, layers)
    elif shape == "nnx-scanned":
        loss, args = nnx_scanned(policy, batch, length, layers)
    else:
        model, tokens = model_of(shape, policy, layers), jax.ShapeDtypeStruct((batch, length), jnp.int32)
        loss, args = lambda p, t: models.loss_of(model.apply(p, t), t), (_params(model, tokens), tokens)
    if ahead is not None:
        loss = nj.ActivationOffloader(offload_threshold_mb=MB, prefetch_ahead=ahead).wrap(loss)
    return loss, args


def _params(model, tokens):
    return jax.eval_shape(model.init, jax.random.key(0), tokens)


def set_aside(texts):
    """Bytes of temporaries that the compiler sets aside, on the device and on the host."""
    sizes = {"device": 0, "host": 0}
    for line in texts("buffer_assignment").splitlines():
        if match := re.match(r"allocation \d+: size (\d+),(.*)preallocated-temp", line):
            sizes["host" if "color 5" in match[2] else "device"] += int(match[1])
    return sizes


def distances(hlo):
    """For each copy between device and host beside which there is anything to compute: matmuls from start to end."""
    found = []
    for computation in re.split(r"\n(?=\S)", hlo):
        gaps, started, matmuls = [], {}, 0
        for line in computation.splitlines():
            name = re.match(r"\s*(?:ROOT )?%(\S+) = ", line)
            if name and "S(5)" in line and re.search(r" (copy|async|fusion)-start\(", line):
                started[name[1]] = matmuls
            elif done := re.search(r" (?:copy|async|fusion)-done\(%([^),]+)", line):
                gaps += [matmuls - started[done[1]]] if done[1] in started else []
            elif re.search(r" (fusion|dot|convolution|custom-call)\(", line):
                matmuls += bool(re.search("gemm|convolution|dot", line))
        found += gaps if matmuls else []
    return found


def measured(shape, row, target, layers):
    loss, args = workload(shape, row, layers)
    where, program = find_target(target), step_of(loss, args, 0, False)
    job = dataclasses.replace(program.job(where, f"{shape} {row}", {}), texts=True)
    [answer] = compile_all([job])
    found = measurement(program, where, answer)
    if answer.bytes is None:
        return {"out_of_memory": found.message, "flops": found.flops}
    sizes, gaps = set_aside(found.texts), distances(found.texts("hlo"))
    return {
        "temp_bytes": sizes["device"],
        "host_bytes": sizes["host"],
        "temp_bytes_by_memory_analysis": found.temp_bytes,
        "flops": found.flops,
        "copies": len(gaps),
        "median_distance": statistics.median(gaps) if gaps else None,
        "seconds": found.seconds,
    }


def table(shape, target, rows):
    flops, full = rows["none"]["flops"], rows["full remat"]["temp_bytes"]
    lines = []
    for name, r in rows.items():
        if "out_of_memory" in r:
            lines.append([name, "out of memory", "", "", "", "", ""])
            continue
        gap = "" if r["median_distance"] is None else f"{r['median_distance']:g}"
        against = f"{100 * (r['temp_bytes'] / full - 1):+.0f} %"
        sizes = [report.size(r["temp_bytes"]), against, report.size(r["host_bytes"])]
        lines.append([name, *sizes, f"{r['flops'] / flops:.3f}", str(r["copies"]), gap])
    columns = ("", "device temp", "against full remat", "host", "FLOPs", "copies", "median distance")
    return report.table(f"12-layer GPT, {shape}, {target}", columns, lines, width=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="h200,v5e")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path)
    asked = parser.parse_args()
    for shape in asked.shapes.split(","):
        for target in asked.targets.split(","):
            rows = {}
            for row in SHAPES[shape]:
                rows[row] = measured(shape, row, target, asked.layers)
                print(f"{shape} {target} {row}: {rows[row]}", file=sys.stderr, flush=True)
            print(table(shape, target, rows), flush=True)
            if asked.out:
                write(asked.out / f"offload_{shape}_{target}.json", rows, asked.layers)


def write(path, rows, layers):
    names = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-pjrt")
    head = {
        "date": str(datetime.date.today()),
        "versions": {n: importlib.metadata.version(n) for n in names},
        "layers": layers,
        "threshold_mb": MB,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
