"""The model of the device peak against compiled bytes, case by case: every case is printed, the bad ones too.

    python benchmarks/peak_table.py [--targets v5e,h200] [--compiled earlier.json] [--out benchmarks/results/peak.json]

The rules of `nexus_jax.peak` were read off the buffer assignments of DEVELOPED. HELD_OUT were not looked at until the rules
were fixed: theirs is the error to expect on a model of your own. Nothing runs; the targets' compilers work without a device.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import statistics
import time

import zoo

import nexus_jax as nj
from nexus_jax import peak, report
from nexus_jax.program import step_of
from nexus_jax.targets.compiler import find_target

DEVELOPED = [
    "gpt:none",
    "gpt:all",
    "gpt:alternate",
    "gpt:heavy_ops",
    "gpt_f32:none",
    "gpt_scanned:none",
    "gpt_scanned:all",
    "gpt_nnx:none",
    "gpt_nnx:all",
    "bert:none",
    "bert:all",
    "scan_offload:none",
    "unet:none",
    "unet:all",
    "mlp:none",
    "mlp:all",
    "patches:none",
    "patches:all",
]
HELD_OUT = [
    "llama:none",
    "llama:all",
    "vit:none",
    "vit:all",
    "moe:none",
    "moe:all",
    "translator:none",
    "translator:all",
    "resnet:none",
    "wavenet:none",
    "recurrent:none",
    "recommender:none",
]


def one(name, targets, compiled):
    """The rows of one step: predicted, and compiled where `compiled` does not have its bytes."""
    model, _, policy = name.partition(":")
    fn, args = getattr(zoo, model)(policy)
    program = step_of(fn, args)
    program.traced  # noqa: B018  traced here, so that the seconds are the model's alone
    rows = []
    for target in targets:
        start = time.process_time()
        found = peak.predict(program, find_target(target))
        seconds = time.process_time() - start
        key = f"{model}.{policy}.{target}"
        if key not in compiled:
            compiled[key] = nj.measure(fn, *args, target=target).device_bytes
        rows.append(
            {
                "model": model,
                "policy": policy,
                "target": target,
                "held_out": name in HELD_OUT,
                "compiled": compiled[key],
                "predicted": found.device_bytes,
                "error": found.device_bytes / compiled[key] - 1,
                "seconds": round(seconds, 3),
                "at": found.peak_path,
            }
        )
    return rows


def summary(rows):
    """Median and worst of the absolute errors, by target, for what was developed on and what was held out."""
    lines = []
    for held_out in (False, True):
        for target in dict.fromkeys(r["target"] for r in rows):
            errors = [abs(r["error"]) for r in rows if r["target"] == target and r["held_out"] == held_out]
            if errors:
                which = "held out" if held_out else "developed on"
                lines.append((which, target, len(errors), f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"))
    return lines


def earlier(path):
    """The compiled bytes of an earlier run of this script."""
    rows = json.loads(path.read_text())["cases"] if path else []
    return {f"{r['model']}.{r['policy']}.{r['target']}": r["compiled"] for r in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="v5e,h200")
    parser.add_argument("--compiled", type=pathlib.Path, help="take compiled bytes from this file where it has them")
    parser.add_argument("--only-compiled", action="store_true", help="leave out what --compiled does not have")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    compiled = earlier(args.compiled)
    rows = []
    targets = [t for t in args.targets.split(",") if t]
    for name in (*DEVELOPED, *HELD_OUT):
        wanted = [t for t in targets if not args.only_compiled or f"{name.replace(':', '.')}.{t}" in compiled]
        rows += one(name, wanted, compiled)
    columns = ("model", "policy", "target", "", "compiled", "predicted", "error", "at the peak")
    lines = [
        (
            *(r[k] for k in ("model", "policy", "target")),
            "held out" if r["held_out"] else "",
            report.size(r["compiled"]),
            report.size(r["predicted"]),
            f"{r['error']:+.1%}",
            r["at"],
        )
        for r in rows
    ]
    print(report.table("device bytes of a step, without and with a compile", columns, lines, width=160))
    print(report.table("absolute error", ("", "target", "cases", "median", "worst"), summary(rows)))
    if args.out:
        packages = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-pjrt")
        versions = {n: importlib.metadata.version(n) for n in packages}
        document = {"date": str(datetime.date.today()), "versions": versions, "cases": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
