"""On a machine with a GPU: peak and time of the rows of docs/offload.md, where everything fits and where it does not.

    python benchmarks/offload_gpu.py [--batches 8,48] [--steps 10] [--out benchmarks/results]
    python benchmarks/offload_gpu.py --layers 4 --batches 2 --length 64 --d-model 64    # a try-out, on any machine

Each row's peak is of a process of its own (a device's peak never falls); its gradients are compared there, at batch 1, with
those of the same step without offloading. Times are medians of steps of all rows that fit, taken in turn in one process. A row that runs
out of memory says so.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import gpt_table
import jax
import on_device
from offload_table import MB, ROWS, workload

import nexus_jax as nj
from nexus_jax import report


def made(row, batch, args):
    gpt_table.SIZE["d"] = args.d_model
    return workload(args.shape, row, args.layers, batch, args.length)


def alone(row, batch, argv):
    """What a row says of itself in a process of its own."""
    command = [sys.executable, __file__, *argv, "--alone", row, "--batches", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        full = "RESOURCE_EXHAUSTED" in done.stderr or "out of memory" in done.stderr.lower()
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return {"failed": "out of memory" if full else last[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def checked(row, batch, args):
    """Peak, and by how much offloading changes the loss and the gradients at batch 1."""
    found = on_device.peak(*made(row, batch, args))
    loss, shapes = made(row, 1, args)
    ahead = ROWS[row][1]
    if ahead is not None:
        offloader = nj.ActivationOffloader(offload_threshold_mb=MB, prefetch_ahead=ahead)
        arrays = jax.tree.map(lambda x: jax.numpy.full(x.shape, 0.01, x.dtype), shapes)
        found["differs"] = offloader.verify(loss, *arrays).largest.difference
    return found


def show(found, batch):
    first = next((r for r in found if r.get("seconds")), None)
    lines = []
    for r in found:
        if "failed" in r:
            lines.append((r["row"], r["failed"], "", "", ""))
            continue
        peak = "unknown" if r["peak"] is None else report.size(r["peak"])
        ratio = f"{r['seconds'] / first['seconds']:.3f}"
        differs = "" if "differs" not in r else f"{r['differs']:.1e}"
        lines.append((r["row"], peak, f"{1e3 * r['seconds']:.1f}", ratio, differs))
    columns = ("", "peak", "ms", "time/first", "gradients differ by")
    return report.table(f"batch {batch} on {jax.devices()[0].device_kind}", columns, lines, width=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="8,48")
    parser.add_argument("--shape", default="unrolled", choices=("unrolled", "scanned"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    for name, default in (("length", 1024), ("layers", 12), ("d-model", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    batches = [int(n) for n in args.batches.split(",")]
    if args.alone:
        print(json.dumps(checked(args.alone, batches[0], args)))
        return
    results = {}
    for batch in batches:
        found = [{"row": row, **alone(row, batch, sys.argv[1:])} for row in ROWS]
        fitting = [r["row"] for r in found if "failed" not in r]
        seconds = on_device.times({row: made(row, batch, args) for row in fitting}, args.steps)
        results[batch] = [{**r, "seconds": seconds.get(r["row"])} for r in found]
        print(show(results[batch], batch), flush=True)
    if args.out:
        (args.out / f"offload_gpu_{args.shape}.json").write_text(
            json.dumps({**on_device.about(), "batches": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
