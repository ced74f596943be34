"""Does a notebook notice when its code is wrong? Flip one operator of an exported function and see whether a cell fails.

    python tools/mutate.py nbs/core/01_checks.ipynb         one mutant per exported function
    python tools/mutate.py --all nbs/core/01_checks.ipynb   every mutant
    python tools/mutate.py                                  one mutant per exported function, every notebook

The notebook runs once. Before each exported cell the process forks a child per mutant, which runs the changed cell and
all that follow: what comes before a mutant is paid for once. A cell that raises, a crash and a timeout kill a mutant; one
that reaches the end survived, and the exit code is 1. All of it happens in a copy of the checkout, because a mutant may write
where the original would not. Mutants that change nothing a test could see stand, with the
reason, in tests/equivalent_mutants.txt. POSIX only; needs no GPU and hides one, because CUDA does not survive a fork.
"""
import argparse
import ast
import ctypes
import difflib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tests" / "equivalent_mutants.txt"
SKIP_FLAGS = {"notest", "slow", "gpu"}


def _both(pairs): return {**dict(pairs), **{b: a for a, b in pairs}}


OPERATORS = _both([(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
                   (ast.In, ast.NotIn), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr)]) | {
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
NAMES = _both([("min", "max"), ("argmin", "argmax"), ("amin", "amax"), ("minimum", "maximum"), ("any", "all"), ("floor", "ceil"),
               ("zeros", "ones"), ("zeros_like", "ones_like"), ("sum", "mean"), ("log", "exp"), ("cos", "sin")])
CONSTANTS = {0: 1, 1: 0, True: False, False: True}


# --- the mutants of a cell ----------------------------------------------------------------------------------------------

def flips(node):
    "Yield `(object, attribute, new value)`, one for each way to spoil this node alone."
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OPERATORS:
        yield node, "op", OPERATORS[type(node.op)]()
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in OPERATORS: yield node, "ops", node.ops[:i] + [OPERATORS[type(op)]()] + node.ops[i + 1:]
    if isinstance(node, ast.Call):
        f = node.func
        if isinstance(f, ast.Attribute) and f.attr in NAMES: yield f, "attr", NAMES[f.attr]
        if isinstance(f, ast.Name) and f.id in NAMES: yield f, "id", NAMES[f.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)) and node.value in CONSTANTS:
        yield node, "value", type(node.value)(CONSTANTS[node.value])
    if isinstance(node, (ast.If, ast.IfExp)) and "cuda" not in ast.unparse(node.test) and isinstance(node.test, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)):
        yield node, "test", ast.UnaryOp(ast.Not(), node.test)
    # `not x` -> `x` and `-x` -> `x`, wherever the expression stands
    for name, value in ast.iter_fields(node):
        unary = lambda v: isinstance(v, ast.UnaryOp) and isinstance(v.op, (ast.Not, ast.USub)) and "cuda" not in ast.unparse(v)
        if unary(value): yield node, name, value.operand
        if isinstance(value, list):
            for i, v in enumerate(value):
                if unary(v): yield node, name, value[:i] + [v.operand] + value[i + 1:]


def inside(function):
    "The nodes whose flips change what a function does: no docstring, no annotation, no text of a message."
    todo = [function]
    while todo:
        node = todo.pop(0)
        if isinstance(node, (ast.Compare, ast.BoolOp, ast.Attribute, ast.Call)) and "cuda" in ast.unparse(node): continue  # there is no GPU to see it
        yield node
        if isinstance(node, (ast.JoinedStr, ast.arg)): continue
        skip = {id(a) for a in (*getattr(node, "decorator_list", ()), getattr(node, "returns", None), getattr(node, "annotation", None)) if a}
        todo += [c for c in ast.iter_child_nodes(node) if id(c) not in skip]


def functions(tree, prefix=""):
    "Yield `(name, node)` for every function and method at the top of a cell."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): yield prefix + node.name, node
        if isinstance(node, ast.ClassDef): yield from functions(node, f"{prefix}{node.name}.")


@dataclass(frozen=True)
class Mutant:
    "One changed cell."
    notebook: str
    cell: int
    function: str
    before: str  # where the cell changes
    after: str
    source: str  # the whole cell, changed

    @property
    def key(self): return f"{self.notebook}::{self.function}: {self.before} => {self.after}"


def _near(a, b, around=50):
    "Two lines cut to where they differ, or whole if they are short."
    first = len(os.path.commonprefix([a, b]))
    last = len(os.path.commonprefix([a[first:][::-1], b[first:][::-1]]))
    left = 0 if first <= around else first - around
    return tuple(("..." if left else "") + s[left:max(first, len(s) - last) + around] + ("..." if last > around else "") for s in (a, b))


def cell_mutants(source, notebook="", cell=0):
    "All mutants of one cell of code, in the order of its functions."
    tree = ast.parse(source)
    original = ast.unparse(tree).splitlines()
    found = []
    for name, function in functions(tree):
        for node in inside(function):
            for target, attribute, new in flips(node):
                old = getattr(target, attribute)
                setattr(target, attribute, new)
                text = ast.unparse(ast.fix_missing_locations(tree))
                setattr(target, attribute, old)
                diff = [d for d in difflib.ndiff(original, text.splitlines()) if d[0] in "+-"]
                before, after = _near(*(" ".join(d[2:].strip() for d in diff if d[0] == s) for s in "-+"))
                if before != after: found.append(Mutant(notebook, cell, name, before, after, text))
    return list({m.key: m for m in found}.values())  # `1` twice in a line can give the same text twice


def choose(mutants):
    "One mutant per function, the same in every run; where there is one, an operator rather than a constant or the edge of a range."
    by_function = {}
    for m in mutants: by_function.setdefault(m.function, []).append(m)
    strip = lambda line: re.sub(r"\b(0|1|True|False)\b", "#", re.sub("([<>])=", r"\1", line))
    chosen = []
    for name, those in by_function.items():
        operators = [m for m in those if strip(m.before) != strip(m.after) and not m.before.startswith("def ")]
        chosen.append(random.Random(name).choice(operators or those))
    return chosen


def allowed():
    "Keys of the mutants that no test can tell from the original, with the reasons."
    if not ALLOWED.exists(): return {}
    lines = [l for l in ALLOWED.read_text(encoding="utf-8").splitlines() if l.strip() and not l.startswith("#")]
    return {key.strip(): reason.strip() for key, _, reason in (l.rpartition("  # ") for l in lines)}


# --- running them -------------------------------------------------------------------------------------------------------

def load(path):
    "The notebook as nbdev's test sees it: directives apart from the source."
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor
    return NBProcessor(path, procs=FrontmatterProc, process=True).nb


def directives(cell): return getattr(cell, "directives_", None) or {}


def runs(cell):
    "Does nbdev's test run this cell?"
    d = directives(cell)
    return cell.cell_type == "code" and not SKIP_FLAGS & d.keys() and d.get("eval:", [""])[0].lower() != "false"


def end_with_parent():
    "A mutant may loop for ever: Linux ends this process when the one that waits for it is killed."
    if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def in_child(work):
    "Fork; the child does `work()` and exits with 0, or with 1 if it raised. Returns its process id."
    pid = os.fork()
    if pid: return pid
    os.setsid()
    end_with_parent()
    code, nowhere = 1, os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        work()
        code = 0
    except BaseException: pass
    finally: os._exit(code)


def wait(pids, limit, room):
    "Wait until fewer than `room` children run; `pids` maps each to `(mutant, start)`. Yields `(mutant, how it ended)`."
    while len(pids) >= room:
        for pid in list(pids):
            mutant, start = pids[pid]
            done, status = os.waitpid(pid, os.WNOHANG)
            late = not done and time.perf_counter() - start > limit
            if not done and not late: continue
            try: os.killpg(pid, signal.SIGKILL)  # the child and whatever it started
            except ProcessLookupError: pass
            if late: os.waitpid(pid, 0)
            del pids[pid]
            yield mutant, "timeout" if late else "survived" if status == 0 else "failed"
        time.sleep(0.01)


@contextmanager
def copy_of_checkout():
    "A folder with the sources, git's history linked."
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", ".cache", "_docs", "_out", "_proc", "*.egg-info", "__pycache__"))
        if (ROOT / ".git").exists(): (root / ".git").symlink_to(ROOT / ".git")
        yield root


def check(root, path, every, jobs):
    "Run one notebook of the checkout `root` and its mutants; the mutants tried and how each ended, or the error of the notebook itself."
    end_with_parent()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "IN_TEST": "1"}
    sys.path.insert(0, str(root))
    from execnb.shell import CaptureShell
    import sklearn.cluster, torch  # noqa: F401  here once, or in every child that comes to need them
    name = str((ROOT / path).resolve().relative_to(ROOT))
    path = root / name
    cells = [c for c in load(path).cells if runs(c)]
    skip = allowed()
    mutants = {}
    for i, cell in enumerate(cells):
        if not {"export", "exports", "exporti"} & directives(cell).keys(): continue
        try: found = cell_mutants(cell.source, name, i)
        except SyntaxError: continue  # a cell with a magic
        found = [m for m in found if m.key not in skip]
        mutants[i] = found if every else choose(found)
    if not any(mutants.values()): return name, [], None
    shell = CaptureShell(path)
    os.chdir(path.parent)

    def go_on(first, source=None):
        for i in range(first, len(cells)):
            shell.run(source if source and i == first else cells[i].source)
            if shell.exc: raise shell.exc from None

    start, pids, results = time.perf_counter(), {}, []
    baseline = {in_child(lambda: go_on(0)): (None, start)}
    if [end for _, end in wait(baseline, 1800, 1)] != ["survived"]: return name, [], "the notebook fails as it stands: python tools/test.py " + name
    limit = 10 + 3 * (time.perf_counter() - start)
    for i, cell in enumerate(cells):
        for m in mutants.get(i, ()):
            results += wait(pids, limit, jobs)
            pids[in_child(lambda: go_on(i, m.source))] = m, time.perf_counter()
        if i < max(mutants): shell.run(cell.source)
    return name, results + list(wait(pids, limit, 1)), None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="notebooks; all that export if none is named")
    parser.add_argument("--all", action="store_true", help="every mutant, not one per function")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--verbose", action="store_true", help="show killed mutants too")
    args = parser.parse_args()
    paths = args.notebooks or sorted(str(p.relative_to(ROOT)) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    survivors, tried, broken = [], 0, 0
    for path in paths:
        # a copy and a process per notebook, so that none sees what another left behind
        with copy_of_checkout() as root, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            name, results, error = pool.submit(check, root, path, args.all, args.jobs).result()
        if error: print(f"{name}: {error}"); broken += 1; continue
        if not results: continue
        alive = [m for m, end in results if end == "survived"]
        late = sum(end == "timeout" for _, end in results)
        print(f"{name}: {len(results) - len(alive)} of {len(results)} killed ({1 - len(alive) / len(results):.0%})" + (f", {late} by the clock" if late else ""), flush=True)
        for m, end in results:
            if end == "survived" or args.verbose: print(f"  {end} in {m.function}\n    - {m.before}\n    + {m.after}", flush=True)
        survivors += alive
        tried += len(results)
    if survivors: print("\nAdd an assert that fails, or a line with the reason to tests/equivalent_mutants.txt:\n" + "\n".join(f"{m.key}  # " for m in survivors))
    print(f"\n{tried - len(survivors)} of {tried} mutants killed" + (f", {broken} notebooks fail as they stand" if broken else ""))
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main())
