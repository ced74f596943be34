"""The suite, as `make test` runs it: every notebook and every test file in a process of its own, studies at smoke scale.

    python tools/test.py                  notebooks (nbdev's test), tests/ (pytest), tour and studies (papermill)
    python tools/test.py PATH...          only these notebooks, test files or folders; no limits on time
    python tools/test.py --deep [PATH...] what takes longer: cells and tests marked slow, mutation check, benchmarks

The last line reads `N passed, N failed, N skipped`; the exit code is 0 when nothing failed.
"""
import argparse
import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("core", "clustering", "pooling", "moe", "kv", "parallelism", "tool")
# Seconds that a family may cost in all, so that the whole command stays under 25 minutes on two cores. What counts is the processor's time, of
# children too: a busy machine makes the clock run on, and a share that depends on the neighbours would say nothing about the family. Clustering has
# twice as many chapters as the others; a fresh machine trains the stand-ins of kv first, for two minutes; and the site is built from nothing and
# read in a browser, 135 pages.
SHARE = {"core": 330, **dict.fromkeys(FAMILIES[1:], 240), "clustering": 440, "kv": 300, "parallelism": 280, "kernels": 300, "site": 180, "house": 180, "tool": 120}
# Test files whose name starts with neither a family nor the name of a module.
FAMILY_OF_TEST = {"test_estimators": "clustering", "test_gpu_check": "kernels"}
WORKERS, TIMEOUT, SLOWEST = 2, 600, 15
ONE_THREAD = {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}
SKIP_FLAGS = ["notest", "slow", "gpu"]


@dataclass
class Item:
    "One process of the suite and what came out of it."
    name: str
    family: str
    command: list
    timeout: float = TIMEOUT
    report: Path | None = None      # where pytest writes its junit file
    seconds: float = 0.             # by the clock
    work: float = 0.                # of the processor, all threads and children
    counts: Counter = field(default_factory=Counter)
    parts: list = field(default_factory=list)  # (seconds, name) of the single tests inside
    output: str = ""
    call: object = None             # instead of `command`: a function for a fork of this process, which has the heavy imports


# --- what there is to run ---------------------------------------------------------------------------------------------

def notebooks():
    "Every notebook below nbs/, relative to the root."
    found = (p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb"))
    return sorted(p for p in found if not any(part[0] in "._" for part in p.parts))


def is_study(path): return path.parts[:2] == ("nbs", "studies") or path.name == "tour.ipynb"


def module_families():
    "Module name -> family, from the notebooks: nbs/core/10_assign.ipynb says that `assign` is of `core`."
    return {re.sub(r"^\d+[a-z]?_", "", p.stem): family_of(p) for p in notebooks() if p.parts[1] in FAMILIES}


def family_of(path):
    "The family that pays for a notebook or a test file; `house` for what belongs to none."
    if path.suffix == ".ipynb":
        if path.parts[1] == "core" and path.stem[:1] == "3": return "kernels"  # what is compiled pays for itself
        if path.parts[1] in FAMILIES: return path.parts[1]
        return next((f for f in FAMILIES if path.stem.startswith(f)), "house")
    if path.stem in FAMILY_OF_TEST: return FAMILY_OF_TEST[path.stem]
    rest = path.stem.removeprefix("test_")
    names = {**{name: name for name in SHARE}, **module_families()}
    matching = [name for name in names if rest == name or rest.startswith(name + "_")]
    return names[max(matching, key=len)] if matching else "house"


def select(paths):
    "The notebooks and test files that `paths` name; all of them if it is empty."
    everything = notebooks() + sorted(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("test_*.py"))
    if not paths: return everything
    wanted = [Path(p).resolve().relative_to(ROOT) for p in paths]
    missing = [w for w in wanted if not any(e == w or w in e.parents for e in everything)]
    if missing: sys.exit(f"no notebook or test file there: {', '.join(map(str, missing))}")
    return [e for e in everything if any(e == w or w in e.parents for w in wanted)]


def uses_flag(path, flag): return re.search(rf'"#\|\s*{flag}\b', (ROOT / path).read_text(encoding="utf-8")) is not None


def make_items(paths, deep, scratch):
    "One item a notebook, a study and a test file, the long ones first."
    me, py = str(Path(__file__).resolve()), sys.executable
    items = []
    for path in select(paths):
        name, family, kind = str(path), family_of(path), path.suffix
        if kind == ".ipynb" and deep:
            if uses_flag(path, "slow"): items.append(Item(name, family, [py, me, "--notebook", name, "--slow"], 3600))
        elif kind == ".ipynb" and is_study(path):
            items.insert(0, Item(name, family, [py, "tools/run.py", name, "-p", "SCALE=smoke"]))
        elif kind == ".ipynb": items.append(Item(name, family, [py, me, "--notebook", name], call=partial(run_notebook, path, False)))
        else:
            report = Path(scratch) / f"{path.stem}.xml"
            command = [py, "-m", "pytest", name, "-m", "slow" if deep else "not slow", f"--junitxml={report}", "--tb=short", "-p", "no:cacheprovider"]
            items.append(Item(name, family, command, 3600 if deep else TIMEOUT, report, call=partial(run_tests, command[3:])))
    if deep:
        nbs = [str(p) for p in select(paths) if p.suffix == ".ipynb"]
        if nbs: items.append(Item("mutation check", "house", [py, "tools/mutate.py", *nbs], 4 * 3600))
        if not paths:
            items += [Item(str(p.relative_to(ROOT)), "house", [py, str(p)], 3600) for p in sorted((ROOT / "benchmarks").glob("[!_]*.py"))]
    return items


# --- running one of them ------------------------------------------------------------------------------------------------

_alive = set()


def _kill(process):
    "End a process and whatever it started."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass


def _wait(process, deadline):
    "Exit code, or `timeout`, and the seconds of work; children that outlive the process are ended with it."
    flags, late = os.WNOHANG, False
    while not (ended := os.wait4(process.pid, flags))[0]:
        if time.perf_counter() > deadline:
            _kill(process)
            flags, late = 0, True
        else: time.sleep(0.02)
    _kill(process)
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    return "timeout" if late else process.returncode, ended[2].ru_utime + ended[2].ru_stime


def preload():
    """What nearly every item imports, here, once: 183 processes with three seconds of imports each were a quarter of the suite's work.

    Nothing of the package itself, nothing that starts a thread, and not Triton, whose interpreter is chosen when it is imported."""
    os.environ.update(ONE_THREAD)
    import fastcore.test, IPython, matplotlib.pyplot, nbdev.test, pytest, scipy.stats, sklearn.utils.estimator_checks, torch  # noqa: F401
    assert "triton" not in sys.modules and not [m for m in sys.modules if m.startswith("deepclustering.")]


@dataclass(eq=False)
class Fork:
    "What `_wait` and `_kill` need of a `Popen`."
    pid: int


def fork(call, log):
    "Run `call()` in a fork of this process, output to `log`; its result is the exit code. As `Popen` with a session of its own."
    sys.stdout.flush()
    if pid := os.fork(): return Fork(pid)
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background has it ignored, and tests send it
        for mine, fd in ((os.open(os.devnull, os.O_RDONLY), 0), (log.fileno(), 1), (log.fileno(), 2)): os.dup2(mine, fd)
        os.chdir(ROOT)
        code = int(call())
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException: traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush(); sys.stderr.flush()
        finally: os._exit(code)


def run(item):
    "Run an item in a process group of its own; nothing of it outlives the call."
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = fork(item.call, log) if item.call else subprocess.Popen(item.command, cwd=ROOT, env=os.environ | ONE_THREAD, stdin=subprocess.DEVNULL, stdout=log,
                                                                          stderr=subprocess.STDOUT, start_new_session=True)
        _alive.add(process)
        code, item.work = _wait(process, start + item.timeout)
        _alive.discard(process)
        log.seek(0)
        item.output = log.read()
    item.seconds = time.perf_counter() - start
    if code == "timeout": item.output += f"\nstopped after {item.timeout:.0f} s"
    if item.report and item.report.exists(): _read_junit(item)
    elif code == 0: item.counts["passed"] += 1
    if code != 0 and not item.counts["failed"] and not (item.report and code == 5):  # 5: pytest selected no test
        item.counts["failed"] += 1
        item.output += f"\nexit code {code}"
    return item


def _read_junit(item):
    "Count pytest's test cases and note how long each took."
    for case in ET.parse(item.report).iter("testcase"):
        kinds = {child.tag for child in case}
        item.counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
        item.parts.append((float(case.get("time", 0)), f"{item.name}::{case.get('name')}"))


def run_notebook(path, slow):
    "nbdev's test of one notebook, in this process; the exit code."
    from nbdev.test import test_nb
    path = (ROOT / path).resolve()
    return not test_nb(path, skip_flags=SKIP_FLAGS, force_flags=["slow"] if slow else [], basepath=ROOT)[0]


def run_tests(arguments):
    "pytest in this process, as `python -m pytest` starts it; the exit code."
    import pytest
    sys.path[0], sys.argv = str(ROOT), ["pytest", *arguments]
    return pytest.main(arguments)


# --- the report ---------------------------------------------------------------------------------------------------------

def tail(text, lines=80):
    "The end of a log: where the reason stands."
    text = text.rstrip().splitlines()
    return "\n".join((["..."] if len(text) > lines else []) + text[-lines:])


def report(items, limits):
    "Print the slowest, each family's total and the closing line; returns the number of failures."
    total = sum((i.counts for i in items), Counter())
    parts = [p for i in items for p in (i.parts or [(i.seconds, i.name)])]
    print(f"\nThe {min(SLOWEST, len(parts))} slowest")
    for seconds, name in sorted(parts, reverse=True)[:SLOWEST]: print(f"  {seconds:7.1f} s  {name}")
    clock, work = Counter(), Counter()
    for i in items:
        clock[i.family] += i.seconds
        work[i.family] += i.work
    print(f"\nSeconds by family   work{'  share' if limits else ''}  clock")
    for family in sorted(work, key=list(SHARE).index):
        over = limits and work[family] > SHARE[family]
        total["failed"] += over
        print(f"  {family:16s} {work[family]:6.0f}{f' {SHARE[family]:6d}' if limits else ''} {clock[family]:6.0f}{'  OUTGREW ITS SHARE' if over else ''}")
    failed = [i.name for i in items if i.counts["failed"]]
    if failed: print("\nFailed\n  " + "\n  ".join(failed))
    print(f"\n{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return total["failed"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--deep", action="store_true", help="what takes longer")
    parser.add_argument("--notebook", help=argparse.SUPPRESS)  # the runner's own call, once a notebook
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.notebook: return run_notebook(args.notebook, args.slow)
    scratch = tempfile.mkdtemp()  # no TemporaryDirectory: the first fork that ends would take it along
    try:
        items, start = make_items(args.paths, args.deep, scratch), time.perf_counter()
        preload()
        # Benchmarks and mutants use both cores themselves, or need them quiet.
        with ThreadPoolExecutor(1 if args.deep else WORKERS) as pool:
            futures = [pool.submit(run, i) for i in items]
            try:
                for n, future in enumerate(as_completed(futures), 1):
                    item = future.result()
                    bad = item.counts["failed"]
                    print(f"[{n}/{len(items)}] {'FAILED' if bad else 'ok':6s} {item.seconds:6.1f} s  {item.name}", flush=True)
                    if bad: print(tail(item.output), flush=True)
                    elif args.deep: print(tail(item.output, 40), flush=True)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(_alive): _kill(process)
                print("stopped by hand", file=sys.stderr)
                return 130
        print(f"\n{len(items)} processes in {time.perf_counter() - start:.0f} s")
        return 1 if report(items, limits=not args.paths and not args.deep) else 0
    finally: shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
