"""Runs students' code, in processes that are given inputs only. Nothing that these say is trusted.

    python -I -S -B worker.py CONFIG

One process imports torch, executes what the chapters themselves define, and confines itself (`jail`). For
each submission it makes a fork, which reads the notebooks and makes a fork for each exercise, for the visible
and the hidden cases apart: what knows hidden inputs is never quoted. Such a fork reads its own section of the
inputs and nothing else. So a process with a student's code holds neither other students' code nor expected
outcomes nor, but for the exercises that its own builds on, any solution.

CONFIG is JSON; `runner.settings` makes it. The grader talks through a socket: it sends {"run": sizes} with
the files of a submission and gets the process's number; it sends {"end": number} when it has read all.
"""

import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import types

CONFIG = json.loads(sys.argv[1])
del sys.argv[1:]
sys.path[:0] = [CONFIG["package"], CONFIG["tools"]]
sys.path += CONFIG["site_packages"]

import linecache  # noqa: E402
import math  # noqa: E402

import torch  # noqa: E402

from homework import extract, jail, wire  # noqa: E402
from homework.canary import canary, canary_case  # noqa: E402
from homework.tell import tell  # noqa: E402
from lecture26.checks.judging import not_callable_with  # noqa: E402
from own_code import by_name, statements  # noqa: E402

OWN_CODE = "<your code>"
LENGTH = struct.Struct("<Q")


# ----------------------------------------------------------------------------------------------------
# The first process: imports, chapters, confinement, forks for submissions
# ----------------------------------------------------------------------------------------------------


class Chapter:
    """A chapter's module without its exercises, and without what cannot be executed for want of these."""

    def __init__(self, name: str, text: str) -> None:
        self.module = types.ModuleType(f"lecture26.{name}")
        sys.modules[self.module.__name__] = self.module  # where later chapters and dataclasses look for it
        setattr(sys.modules["lecture26"], name, self.module)
        self.known = by_name(statements(text))
        unique = {id(statement): statement for statement in self.known.values()}
        self.waiting = [statement.text for statement in unique.values()]
        self.execute()

    def execute(self, *texts: str) -> None:
        """Execute texts, then what has been waiting for the names that these define."""
        for text in texts:
            exec(compile(text, self.module.__name__, "exec"), self.module.__dict__)
        waiting, self.waiting = self.waiting, []
        for text in waiting:
            try:
                exec(compile(text, self.module.__name__, "exec"), self.module.__dict__)
            except (ImportError, NameError):
                self.waiting.append(text)


def main() -> None:
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, 256)
    jail.end_with_parent()
    jail.hide_memory()
    torch.set_num_threads(1)
    channel = socket.socket(fileno=CONFIG["channel"])
    texts = wire.unpack_cases(part_of_inputs(CONFIG["chapters"]))[1]["chapters"]
    chapters = {name: Chapter(name, text) for name, text in texts}
    warm_up()
    taken, null = virtual_memory(), os.open(os.devnull, os.O_RDWR)
    limit(resource.RLIMIT_FSIZE, 0)  # not before the imports: tempfile tries its folder by writing
    if CONFIG["guarded"]:
        jail.see_only(CONFIG["readable"])
        holes = in_a_fork(lambda: jail.compute_only() or jail.holes(os.getcwd()))
        if holes:
            channel.sendall(json.dumps({"holes": holes}).encode())
            return
    nowhere(null)
    channel.sendall(b'{"ready": true}')
    serve(channel, chapters, taken)


def warm_up() -> None:
    """What torch loads at a first call, it loads before the forks."""
    tell(canary, [canary_case(0)] * 2)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    tempfile.tempdir = os.getcwd()  # else a module that asks for it would try where it can write


def serve(channel: socket.socket, chapters: dict[str, Chapter], taken: int) -> None:
    """Answer the grader until it hangs up; then nothing is left."""
    running: set[int] = set()
    try:
        while True:
            message, files, _, _ = socket.recv_fds(channel, 4096, 2)
            if not message:
                return
            request = json.loads(message)
            if "end" in request:
                running.discard(request["end"])
                answer = {"cpu_s": end(request["end"])}
            else:
                answer = {"pid": start(channel, request["run"], *files, chapters, taken)}
                running.add(answer["pid"])
            channel.sendall(json.dumps(answer).encode())
    finally:
        for pid in running:
            end(pid)


def start(
    channel: socket.socket, sizes: dict, notebooks: int, answers: int, chapters: dict, taken: int
) -> int:
    """Fork for a submission; `taken` are the bytes of address space that no student has asked for."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            jail.end_with_parent()
            channel.close()
            read_submission(sizes, notebooks, answers, chapters, taken)
        finally:
            os._exit(0)
    os.close(notebooks)
    os.close(answers)
    return pid


def end(pid: int) -> float:
    """End a submission's processes; returns the seconds of processor time that they took."""
    for kill in (os.killpg, os.kill):  # the group is made by the process itself, if it came to that
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    usage = os.wait4(pid, 0)[2]
    return usage.ru_utime + usage.ru_stime


# ----------------------------------------------------------------------------------------------------
# A submission's process: its notebooks are read, and a fork is made for each piece of code
# ----------------------------------------------------------------------------------------------------


def read_submission(sizes: dict[str, int], notebooks: int, answers: int, chapters: dict, taken: int) -> None:
    """Send a frame for each item: what was found, then what its code gave, on visible and on hidden cases."""
    if taken:
        limit(resource.RLIMIT_AS, taken + CONFIG["memory"])
    with os.fdopen(notebooks, "rb") as file:
        raw = {name: file.read(size) for name, size in sizes.items()}
    for name, items in CONFIG["notebooks"].items():
        if name not in raw:
            continue
        try:
            cells = extract.cells_of(raw[name])
        except ValueError as error:
            send(answers, {"notebook": name, "problem": str(error)})
            continue
        notebook = extract.statements_of(cells, name, {item["mark"] for item in items})
        for item in items:
            found = find(cells, notebook, item, chapters)
            about = {"name": item["name"], "cell": found.cell, "notes": found.notes, "problem": found.problem}
            if found.problem or not item["sections"]:
                send(answers, about)
                continue
            runs = [("not run", b"")] * 2
            for number, place in enumerate(item["sections"]):
                runs[number] = run_apart(found.code, item, place, chapters, answers)
                if runs[number][0] != "ok":
                    break
            send(answers, about | {"status": [status for status, _ in runs]}, *(data for _, data in runs))
    send(answers, {"end": True})


def find(cells: list, notebook: object, item: dict, chapters: dict) -> extract.Found:
    """The student's answer to an item."""
    if item["kind"] != "function":
        return extract.answer_of(cells, item["mark"])
    known = chapters[item["chapter"]].known
    return extract.function_of(cells, notebook, item["function"], item["mark"], known, item["builds_on"])


def run_apart(code: str, item: dict, place: list[int], chapters: dict, answers: int) -> tuple[str, bytes]:
    """Run code in a fork of its own: "ok" and its answer, or why there is none."""
    ours, theirs = os.pipe()
    deadline = time.monotonic() + CONFIG["seconds"]
    pid = os.fork()
    if pid == 0:
        try:
            os.close(answers)
            os.close(ours)
            confined(code, item, place, chapters, theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    data, status = bytearray(), "ok"
    while status == "ok":
        if not select.select([ours], [], [], max(deadline - time.monotonic(), 0))[0]:
            status = "took too long"
        elif not (part := os.read(ours, 1 << 16)):
            break
        else:
            data += part
        if len(data) > wire.MAX_SECTION:
            status = "gives too much"
    os.close(ours)
    ended = wait_or_kill(pid)
    if status != "ok":
        return status, b""
    if not data:
        too_long = os.WIFSIGNALED(ended) and os.WTERMSIG(ended) in (signal.SIGXCPU, signal.SIGKILL)
        return "took too long" if too_long else "ended its process", b""
    return "ok", bytes(data)


def wait_or_kill(pid: int) -> int:
    """Wait for a process that has hung up, but not for long; returns how it ended."""
    for _ in range(100):
        found, ended = os.waitpid(pid, os.WNOHANG)
        if found:
            return ended
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def send(pipe: int, about: dict, *payloads: bytes) -> None:
    """Write a frame: the length of its JSON, the JSON, the payloads."""
    header = json.dumps(about | {"sizes": [len(payload) for payload in payloads]}).encode()
    write(pipe, LENGTH.pack(len(header)) + header + b"".join(payloads))


def write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


# ----------------------------------------------------------------------------------------------------
# A fork for a piece of student's code
# ----------------------------------------------------------------------------------------------------


def confined(code: str, item: dict, place: list[int], chapters: dict, pipe: int) -> None:
    """Execute student's code under limits and write what it gives."""
    jail.end_with_parent()
    section = part_of_inputs(place)
    os.dup2(0, CONFIG["inputs"])  # the other sections are out of reach from here on
    limit(resource.RLIMIT_CPU, CONFIG["cpu_s"], CONFIG["cpu_s"] + 1)
    if CONFIG["guarded"]:
        jail.compute_only()
    try:
        data = called(code, item, section, chapters)
    except BaseException as error:  # of any kind, since sys.exit() in a cell is the student's, too
        data = wire.section({"problem": f"it raises {type(error).__name__}: {str(error)[:200]}"}, {})
    write(pipe, data)


def called(code: str, item: dict, section: bytes, chapters: dict) -> bytes:
    """What a student's function does on the cases of a section, as a section; of a question, its answer."""
    cases, plain = wire.unpack_cases(section)
    for chapter, text in plain["references"]:
        chapters[chapter].execute(text)
    chapter = chapters[item["chapter"]]
    chapter.execute()
    namespace = chapter.module.__dict__
    linecache.cache[OWN_CODE] = len(code), None, code.splitlines(keepends=True), OWN_CODE  # to quote a line
    exec(compile(code, OWN_CODE, "exec"), namespace)
    result = namespace.get(item["function"])
    if item["kind"] == "question":
        return wire.section({"value": plain_value(result)}, {})
    problem = not_callable_with(tuple(item["parameters"]), result)
    if problem:
        return wire.section({"problem": problem}, {})
    return tell(result, cases)


def plain_value(value: object) -> object:
    """An answer as JSON knows it."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is ... or value is None:
        return None
    return value if isinstance(value, bool | int | float | str) else str(value)[:200]


# ----------------------------------------------------------------------------------------------------


def part_of_inputs(place: list[int]) -> bytes:
    """The part of the inputs at (begin, length)."""
    begin, length = place
    return os.pread(CONFIG["inputs"], length, begin)


def in_a_fork(function: object) -> object:
    """What a function returns in a process of its own."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            write(theirs, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        found = file.read()
    os.waitpid(pid, 0)
    return json.loads(found)


def nowhere(null: int) -> None:
    """What is printed from here on goes nowhere, and there is nothing to read."""
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def virtual_memory() -> int:
    """Bytes of address space that this process has taken; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def limit(what: int, soft: int, hard: int | None = None) -> None:
    """Set a limit of this process, which cannot be raised again."""
    old = resource.getrlimit(what)[1]
    ceiling = math.inf if old == resource.RLIM_INFINITY else old
    hard = min(soft if hard is None else hard, ceiling)
    resource.setrlimit(what, (min(soft, hard), hard))


if __name__ == "__main__":
    main()
