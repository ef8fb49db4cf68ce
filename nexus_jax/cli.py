"""``nexus-jax``: what a step costs, from the command line. ``nexus-jax --help`` lists the commands."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from nexus_jax import report

TOO_LARGE = 3  # exit status: measured, and more than --max-device-bytes (or the target's memory with --must-fit)
NOT_ENGAGED = 3  # exit status of ``engaged``: something that the policy wants did not happen
FAILED = 2  # exit status: no answer; one line on standard error says why
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 (no answer) or 3 (larger than allowed)."""
    args = _parser().parse_args(argv)
    warnings.showwarning = _warn
    # A trace is millions of objects that stay: looking through them again and again is a tenth of the time.
    gc.set_threshold(100_000, 20, 100)
    _quieten_devices(args)
    try:
        _check_platforms()
        return args.run(args)
    except KeyboardInterrupt:
        print("nexus-jax: interrupted; finished compiles are kept", file=sys.stderr)
        return 130
    except (Exception, SystemExit) as error:  # a user's file may raise anything; a traceback of ours helps nobody
        print(f"nexus-jax: {_sentence(error, getattr(args, 'workload', None))}", file=sys.stderr)
        return FAILED


def _sentence(error: BaseException, workload: str | None) -> str:
    from nexus_jax.workload import WorkloadError, described

    file = pathlib.Path(workload.rpartition(":")[0]) if workload else None
    if file is None or isinstance(error, WorkloadError):
        return described(error)
    told = described(error, file)
    return f"{file}: {told}" if told.startswith("line ") else told


def _quieten_devices(args: argparse.Namespace) -> None:
    """Keep JAX from looking for devices that are not asked about, or not there: it prints at length what it misses."""
    import logging

    import jax

    from nexus_jax import _compat

    # The compiler of a GPU that is not here: JAX misses the half of its plugin that runs programs.
    logging.getLogger("jax_plugins.xla_cuda13").setLevel(logging.ERROR)
    logging.getLogger(_compat.PLUGIN_LOGGER).addFilter(_in_one_line)
    wanted = (args.target or ["local"]) if hasattr(args, "target") else []
    if not getattr(jax.config, "jax_platforms", None) and ("local" not in wanted or _compat.no_accelerator()):
        jax.config.update("jax_platforms", "cpu")


def _check_platforms() -> None:
    """Raise a ``ValueError`` if the user named a platform that is not there: JAX may fail without a word, and anywhere."""
    import jax

    named = getattr(jax.config, "jax_platforms", None)
    try:
        if named and named != "cpu":
            jax.devices()
    except (Exception, SystemExit) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"JAX_PLATFORMS={named}: JAX has no such device here ({why}). Unset it, or write JAX_PLATFORMS=cpu: only "
            "--target local needs a device."
        ) from None


def _in_one_line(record: Any) -> bool:
    """Log what an exception says without its traceback."""
    if record.exc_info:
        kind, error, _ = record.exc_info
        record.msg, record.args = (
            f"nexus-jax: {record.getMessage()}: {' '.join([kind.__name__, str(error)]).strip()}",
            (),
        )
        record.exc_info = None
    return True


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"nexus-jax: {message}", file=sys.stderr)


# --- arguments -----------------------------------------------------------------------------------------------------


def bytes_of(text: str) -> int:
    """``"15GiB"``, ``"16GB"``, ``"1000"`` as bytes.

    Example:
        >>> bytes_of("15GiB"), bytes_of("16 GB"), bytes_of("1000")
        (16106127360, 16000000000, 1000)
    """
    import re

    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", text)
    try:
        value = float(found[1]) * _UNITS[found[2].upper()]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 15GiB, 16GB or a number of bytes") from None
    return int(value)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no time: write a number of seconds above 0")


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no setting: write name=value")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nexus-jax", description="What a training step costs, on a device you do not own."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    about = {
        "residuals": ("what autodiff keeps, and why", _residuals),
        "measure": ("compile the step for a target", _measure),
        "compare": ("policies side by side", _compare),
        "timeline": ("device bytes over the step, as a picture and a page", _timeline),
        "fit": ("the largest batch that fits", _fit),
        "engaged": ("whether the compiled step does what its policy wants", _engaged),
        "plan": ("a save/recompute plan whose compiled step fits a budget", _plan),
        "doctor": ("flags, environment and step: what would keep a policy from doing what it says", _doctor),
    }
    made = {}
    for name, (help_, run) in about.items():
        made[name] = commands.add_parser(name, help=help_, description=f"nexus-jax {name}: {help_}.")
        made[name].set_defaults(run=run)
        _common(made[name], several=name in ("compare", "measure"))
    for name in ("measure", "compare"):
        made[name].add_argument(
            "--max-device-bytes", type=bytes_of, metavar="SIZE", help=f"exit {TOO_LARGE} if any is larger"
        )
        made[name].add_argument(
            "--must-fit", action="store_true", help=f"exit {TOO_LARGE} if any does not fit its target"
        )
    made["timeline"].add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("timeline"), help="folder of the picture and the page"
    )
    made["fit"].add_argument("--vary", default="batch", help="the workload's parameter to grow (default: batch)")
    made["fit"].add_argument("--multiple", type=int, default=1, help="try only multiples of this")
    made["fit"].add_argument("--at-most", type=int, default=2**16, help="where to stop")
    made["fit"].add_argument(
        "--limit", type=bytes_of, metavar="SIZE", help="device bytes to stay within (default: the target's)"
    )
    made["plan"].add_argument("--budget", required=True, metavar="SIZE", help="12GiB, 16GB, or 90%% of the target's")
    made["plan"].add_argument(
        "--host-budget",
        default="0",
        metavar="SIZE",
        help="host memory that may be offloaded to, 64GiB; none by default",
    )
    made["plan"].add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the plan as TOML")
    made["plan"].add_argument(
        "--picture",
        type=pathlib.Path,
        metavar="FILE",
        help="draw what memory buys: all plans, fixed policies (.png, .svg)",
    )
    made["plan"].add_argument("--time-limit", type=_seconds, help="seconds for the solver")
    diff = commands.add_parser("diff", help="what changed between two reports of compare --json")
    diff.add_argument("before", type=pathlib.Path)
    diff.add_argument("after", type=pathlib.Path)
    diff.add_argument(
        "--max-growth", type=bytes_of, metavar="SIZE", help=f"exit {TOO_LARGE} if a target's device bytes grew by more"
    )
    diff.set_defaults(run=_diff)
    targets = commands.add_parser("targets", help="the known targets and their data sheets")
    targets.add_argument("name", nargs="?", help="show one data sheet, with its sources")
    targets.set_defaults(run=_targets)
    return parser


def _common(parser: argparse.ArgumentParser, several: bool) -> None:
    parser.add_argument(
        "workload", metavar="WORKLOAD", help="file.py:function, which returns (loss, abstract arguments)"
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="T",
        help="v5e, v5p:4x4x4, h200, ...; default: the local device" + "; repeat for several" * several,
    )
    parser.add_argument("--policy", action="append", metavar="P", help="a name or a file; repeat for several")
    parser.add_argument(
        "--set", action="append", type=_setting, default=[], metavar="NAME=VALUE", help="a parameter of the workload"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="for machines; to standard output without a file"
    )
    parser.add_argument("--timeout", type=_seconds, default=1800.0, help="seconds for one compile")


def _workload(args: argparse.Namespace) -> Any:
    from nexus_jax.workload import load

    return load(args.workload, dict(args.set))


def _targets_of(args: argparse.Namespace) -> list[str]:
    return args.target or ["local"]


def _single_target(args: argparse.Namespace) -> str:
    if len(_targets_of(args)) > 1:
        raise ValueError("this command takes one --target.")
    return _targets_of(args)[0]


def _targets_known(args: argparse.Namespace) -> None:
    from nexus_jax.targets.compiler import find_target

    for target in _targets_of(args):
        find_target(target)


def _show(args: argparse.Namespace, text: Any, machine: Any) -> None:
    """Print a table, or write JSON; JSON alone goes to standard output, so that it can be piped."""
    if args.json is None:
        print(text)
        return
    document = json.dumps(machine, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(document)
        return
    print(text)  # first: it is not lost where the file cannot be written
    pathlib.Path(args.json).write_text(document)


# --- commands ------------------------------------------------------------------------------------------------------


def _residuals(args: argparse.Namespace) -> int:
    from nexus_jax.compare import name_of
    from nexus_jax.program import check_loss
    from nexus_jax.residuals import residuals

    _targets_known(args)  # the same on all of them
    workload, found = _workload(args), {}
    for policy in args.policy or [None]:
        loss, arguments = workload(policy)
        check_loss(loss, arguments)
        found[name_of(policy)] = residuals(loss, *arguments)
    text = "\n".join(f"{name or workload.name}\n{kept}" for name, kept in found.items())
    _show(args, text, {name: kept.as_dict() for name, kept in found.items()})
    return 0


def _measure(args: argparse.Namespace) -> int:
    comparison = _compared(args, args.policy or [])
    measured = [m for row in comparison for m in row.measured.values()]
    names = [row.policy for row in comparison for _ in row.measured]
    text = "\n".join(f"{name or args.workload}\n{m}" for name, m in zip(names, measured, strict=True))
    _show(args, text, comparison.as_dict())
    return _status(args, comparison)


def _compare(args: argparse.Namespace) -> int:
    from nexus_jax.compare import POLICIES

    comparison = _compared(args, args.policy or POLICIES)
    _show(args, comparison, comparison.as_dict())
    return _status(args, comparison)


def _compared(args: argparse.Namespace, policies: Sequence[Any], schedules: bool = False) -> Any:
    from nexus_jax.compare import compare

    targets = _targets_of(args)
    return compare(_workload(args), policies, targets=targets, timeout=args.timeout, schedules=schedules)


def _status(args: argparse.Namespace, comparison: Any) -> int:
    status = 0
    for row in comparison:
        for target, m in row.measured.items():
            who = f"{row.policy or args.workload} on {target}: {report.size(m.device_bytes)}"
            if args.max_device_bytes is not None and m.device_bytes > args.max_device_bytes:
                print(f"nexus-jax: {who} is more than {report.size(args.max_device_bytes)}", file=sys.stderr)
                status = TOO_LARGE
            if args.must_fit and m.fits is False:
                limit = m.limit_bytes
                why = f": {m.message}" if limit is None or m.device_bytes <= limit else f" {report.size(limit)}"
                print(f"nexus-jax: {who} does not fit{why}", file=sys.stderr)
                status = TOO_LARGE
    return status


def _timeline(args: argparse.Namespace) -> int:
    from nexus_jax import timeline

    target = _single_target(args)
    args.out.mkdir(parents=True, exist_ok=True)
    comparison = _compared(args, args.policy or ["none", "heavy_ops"], schedules=True)
    [name] = comparison.targets
    measured = {row.policy: row.measured[name] for row in comparison}
    lines = {policy: m.timeline() for policy, m in measured.items()}
    limit = comparison[0].measured[name].limit_bytes
    written = [args.out / f"timeline_{target.replace(':', '_')}.{kind}" for kind in ("png", "svg", "html")]
    for path in written[:2]:
        timeline.draw(lines, path, capacity=limit)
    timeline.write_html(lines, written[2])
    text = "\n".join(f"{policy}{_unfitting(measured[policy])}\n{timeline.table(t)}" for policy, t in lines.items())
    shown = {
        p: {
            "peak_bytes": int(t.peak_bytes),
            "reserved": int(t.reserved),
            "peak_step": int(t.peak_step),
            "limit_bytes": limit,
            "fits": measured[p].fits,
        }
        for p, t in lines.items()
    }
    _show(args, f"{text}\nwritten: {', '.join(map(str, written))}", shown)
    return 0


def _unfitting(m: Any) -> str:
    if m.fits is not False:
        return ""
    return (
        f": does not fit {m.target}, {report.size(m.device_bytes)} of {report.size(m.limit_bytes)}; what would fill it:"
    )


def _fit(args: argparse.Namespace) -> int:
    from nexus_jax.fit import fit

    found = fit(
        _workload(args),
        args.vary,
        args.policy or (None,),
        target=_single_target(args),
        limit_bytes=args.limit,
        multiple=args.multiple,
        at_most=args.at_most,
        timeout=args.timeout,
    )
    _show(args, found, found.as_dict())
    return 0


def _engaged(args: argparse.Namespace) -> int:
    from nexus_jax.compare import name_of
    from nexus_jax.engaged import engaged

    workload, target, found = _workload(args), _single_target(args), {}
    for policy in args.policy or [None]:
        loss, arguments = workload(policy)
        found[name_of(policy)] = engaged(loss, *arguments, target=target, timeout=args.timeout)
    text = "\n".join(f"{name or workload.name}\n{checks}" for name, checks in found.items())
    _show(args, text, {name: checks.as_dict() for name, checks in found.items()})
    return 0 if all(checks.engaged for checks in found.values()) else NOT_ENGAGED


def _plan(args: argparse.Namespace) -> int:
    from nexus_jax.planner import Planner, picture

    if args.policy:
        raise ValueError("a plan takes the place of a policy: leave --policy out.")
    workload = _workload(args)
    # A plan chooses among all that the plain model keeps: what a policy recomputes already is not there to be chosen.
    loss, arguments = workload("none" if "policy" in workload.parameters else None)
    target = _single_target(args)
    with _libraries_silenced():
        planner = Planner(loss, arguments, target=target, host_budget=args.host_budget)
        found = planner.plan(args.budget, args.time_limit)
    figures = ("target", "objective", "budget", "device_bytes", "host_bytes", "predicted_bytes", "unplanned_bytes")
    machine = {name: getattr(found, name) for name in (*figures, "extra_flops", "step_flops", "gap", "trials")}
    _show(args, found, machine)
    if args.out:
        found.save(args.out)
    if args.picture:
        picture.draw(planner, found, args.picture)
    return 0


@contextlib.contextmanager
def _libraries_silenced() -> Iterator[None]:
    """Drop what C libraries print: HiGHS says on standard output where it repairs an answer, amid a user's JSON."""

    def flush() -> None:
        sys.stdout.flush()
        with contextlib.suppress(OSError, TypeError):
            ctypes.CDLL(None).fflush(None)

    flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            flush()
            os.dup2(kept, 1)
            os.close(kept)


def _doctor(args: argparse.Namespace) -> int:
    from nexus_jax.doctor import doctor
    from nexus_jax.program import check_loss

    workload, target, found = _workload(args), _single_target(args), {}
    for policy in args.policy or [None]:
        loss, arguments = workload(policy)
        check_loss(loss, arguments)
        found[policy] = doctor(loss, *arguments, target=target)
    text = "\n".join(f"{policy or workload.name}\n{report_}" for policy, report_ in found.items())
    _show(args, text, {str(policy): [dataclasses.asdict(f) for f in report_] for policy, report_ in found.items()})
    return 0


def _diff(args: argparse.Namespace) -> int:
    from nexus_jax.compare import difference

    before, after = _read(args.before), _read(args.after)
    lines = difference(before, after)
    print("\n".join(lines) or "no change")
    if args.max_growth is None:
        return 0
    old = {(r["policy"], t): m["device_bytes"] for r in before["rows"] for t, m in r["measured"].items()}
    new = {(r["policy"], t): m["device_bytes"] for r in after["rows"] for t, m in r["measured"].items()}
    return TOO_LARGE if any(new[k] - old[k] > args.max_growth for k in new if k in old) else 0


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None


def _targets(args: argparse.Namespace) -> int:
    from nexus_jax.targets import sheets

    if args.name:
        print(sheets.sheet(args.name))
        return 0
    rows = [
        (
            s.name,
            report.size(s.usable_bytes),
            f"{s.bf16_flops / 1e12:.0f}",
            f"{s.memory_bandwidth / 1e9:.0f}",
            f"{s.host_to_device_bandwidth / 1e9:.0f}",
        )
        for s in map(sheets.sheet, sheets.names())
    ]
    print(report.table("targets", ("target", "memory", "bf16 TFLOP/s", "GB/s", "host link GB/s"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
