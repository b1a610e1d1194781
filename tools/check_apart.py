"""Check learners' functions, each in a process of its own with a time limit; `tools/mine.py` calls it.

    python tools/check_apart.py ROOT SECONDS

Standard input holds a list of jobs in JSON, each with the `name` of an exercise, its `function`, and the
`text` of a module that defines it. Standard output is a list of what is wrong with each, null where nothing
is. The reference is that of the package in the folder ROOT.
"""

import json
import linecache
import multiprocessing
import os
import sys
import types
from multiprocessing.connection import Connection


def main() -> None:
    root, limit = sys.argv[1:]
    sys.path.insert(0, root)
    jobs = json.load(sys.stdin)
    # On Linux torch is imported once, and each check is a fork; elsewhere such forks are unsafe.
    method = "fork" if sys.platform == "linux" else "spawn"
    if method == "fork":
        import lecture26.checks  # noqa: F401
    context = multiprocessing.get_context(method)
    json.dump([check_apart(context, job, float(limit)) for job in jobs], sys.stdout)


def check_apart(context: multiprocessing.context.BaseContext, job: dict, limit: float) -> str | None:
    """What is wrong with the function of a job, or None; its process is gone afterwards."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(job, sys.path, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(limit) else f"its check has not ended after {limit:g} s"
    except EOFError:
        return "its check has ended the whole process"
    finally:
        process.kill()
        process.join()


def report(job: dict, path: list[str], connection: Connection) -> None:
    """Send what is wrong with the function of a job, or None; all that is printed meanwhile goes nowhere."""
    sys.path[:] = path
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    try:
        found = fault(**job)
    except BaseException as error:  # of any kind, since sys.exit in a cell is the learner's, too
        found = f"its cells raise {type(error).__name__}: {error}".partition("\n")[0]
    connection.send(found)


def fault(name: str, function: str, text: str) -> str | None:
    """What the check of an exercise finds wrong with a function of a module's text; None if it passes."""
    from lecture26.checks import check

    module = types.ModuleType("own_module")
    sys.modules[module.__name__] = module  # where a dataclass looks for it
    filename = f"<{module.__name__}>"
    linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename  # to quote a line
    exec(compile(text, filename, "exec"), module.__dict__)
    result = check(name, getattr(module, function))
    if result:
        return None
    mistake = getattr(result, "misconception", None)
    details = getattr(result, "message", "").splitlines()[1:2]
    return f"it is wrong: {mistake}" if mistake else " ".join(["it is wrong.", *details])


if __name__ == "__main__":
    main()
