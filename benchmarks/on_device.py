"""On a machine with a GPU or TPU: what the compiler and the time model say of a step, against what the device does.

    python benchmarks/on_device.py [--policies none,all,alternate,heavy_ops] [--steps 10] [--out benchmarks/results]
    python benchmarks/on_device.py --layers 2 --d-model 64 --length 64 --batch 2      # a try-out, on any machine

For each policy, the GPT of gpt_table.py at a size that fits: the device's own peak of memory while steps run, in a
process of its own (a device's peak never falls), beside the bytes of the compiled step; and the median time of a step,
policies in turn in one process, beside the roofline of the data sheet and of a calibration measured here.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import time

import gpt_table
import jax

from nexus_jax import calibration, flops, report, roofline
from nexus_jax.measure import measure
from nexus_jax.program import step_of
from nexus_jax.targets import sheets

PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda13-pjrt", "jax-cuda12-pjrt", "libtpu")


def workload(policy, args):
    gpt_table.SIZE["d"] = args.d_model
    return gpt_table.linen(policy, batch=args.batch, length=args.length, layers=args.layers)


def compiled(loss, shapes):
    """The compiled step of a loss, and arrays to run it on."""
    step = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    arrays = jax.jit(lambda: jax.tree.map(lambda x: jax.numpy.full(x.shape, 0.01, x.dtype), shapes))()
    return step, jax.block_until_ready(arrays)


def peak(loss, shapes):
    """Bytes in use at most while a few steps run, and those in use before; None where the device does not say."""
    step, arrays = compiled(loss, shapes)
    stats = jax.devices()[0].memory_stats()
    if not stats:
        return {"before": None, "peak": None}
    for _ in range(3):
        jax.block_until_ready(step(*arrays))
    return {"before": stats["bytes_in_use"], "peak": jax.devices()[0].memory_stats()["peak_bytes_in_use"]}


def peaks(policies, argv):
    found = {}
    for policy in policies:
        command = [sys.executable, __file__, *argv, "--peak-of", policy]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[policy] = json.loads(done.stdout.splitlines()[-1])
    return found


def times(workloads, rounds):
    """Median seconds of a step of each ``name: (loss, shapes)``, taken in turn."""
    steps = {name: compiled(*workload) for name, workload in workloads.items()}
    found = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, (step, arrays) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*arrays))
            if round_ >= 2:  # warm
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def sheet_here():
    """The data sheet whose name is part of the device's kind (``"NVIDIA H100 80GB HBM3"``), or None."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    known = [name for name in sheets.names() if name.split("-")[0] in kind]
    return sheets.sheet(known[-1]) if known else None


def rows(policies, args, argv):
    measured_peaks = peaks(policies, argv)
    seconds = times({policy: workload(policy, args) for policy in policies}, args.steps)
    sheet, calibrated = sheet_here(), calibration.calibrate()
    for policy in policies:
        loss, shapes = workload(policy, args)
        program = step_of(loss, shapes)
        count = flops.count(program.fun, *program.arrays)
        found = measure(loss, *shapes)
        yield {
            "policy": policy,
            "compiled_bytes": found.device_bytes,
            "peak_bytes": measured_peaks[policy]["peak"],
            "bytes_before": measured_peaks[policy]["before"],
            "flops": count.flops,
            "seconds": seconds[policy],
            "sheet_seconds": sheet and roofline.step_time(count, sheet).seconds,
            "calibrated_seconds": roofline.step_time(count, calibrated).seconds,
        }


def table(found):
    lines = []
    for row in found:
        size = lambda n: "unknown" if n is None else report.size(n)
        ratio = lambda a, b: "" if not a or not b else f"{a / b:.3f}"
        lines.append(
            (
                row["policy"],
                size(row["compiled_bytes"]),
                size(row["peak_bytes"]),
                ratio(row["peak_bytes"], row["compiled_bytes"]),
                f"{row['seconds'] * 1e3:.1f}",
                ratio(row["seconds"], found[0]["seconds"]),
                ratio(row["sheet_seconds"], row["seconds"]),
                ratio(row["calibrated_seconds"], row["seconds"]),
            )
        )
    columns = ("policy", "compiled", "peak", "peak/compiled", "ms", "time/first", "sheet/ms", "calibrated/ms")
    return report.table(f"on {jax.devices()[0].device_kind}", columns, lines)


def about():
    """Date, device and versions, for a file of figures."""
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {"date": str(datetime.date.today()), "device": jax.devices()[0].device_kind, "versions": versions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="none,all,alternate,heavy_ops")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    for name, default in (("batch", 8), ("length", 1024), ("layers", 12), ("d-model", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.peak_of:
        print(json.dumps(peak(*workload(args.peak_of, args))))
        return
    found = list(rows(args.policies.split(","), args, sys.argv[1:]))
    print(table(found))
    if args.out:
        (args.out / "on_device.json").write_text(json.dumps({**about(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
