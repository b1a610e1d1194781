"""The grader's side of `worker`: starts it, hands it submissions, takes its answers, and ends what it leaves.

While this runs, expected outcomes exist nowhere: only the cases' inputs do.
"""

import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from course import ROOT, CourseError

from . import jail
from .wire import MAX_SECTION

CPU_SECONDS = (
    8  # for the visible cases of an exercise, and again for the hidden ones; a right answer takes below 1
)
SECONDS = 60  # for the same on a busy machine
SUBMISSION_SECONDS = 120  # for all of a submission
MEMORY = 2**30  # bytes beyond those that torch takes
MAX_ANSWERS = 8 * MAX_SECTION
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Inputs:
    """What students' code is given, the same for all submissions.

    content: sections, one behind the other; chapters: (begin, length) of the chapters' own code in it.
    notebooks: for each notebook its items, as `worker` reads them, with the places of their sections.
    package: the folder that holds the package lecture26 as it was handed out.
    """

    content: bytes
    chapters: tuple[int, int]
    notebooks: dict[str, list[dict]]
    package: Path


@dataclass(frozen=True)
class Frame:
    """What the worker sent about one item or notebook: JSON, and bytes that students' code has made."""

    about: dict
    payloads: tuple[bytes, ...]


@dataclass(frozen=True)
class Answers:
    """All that came of a submission; `problem` says what ended it early. cpu_s: seconds of processor time."""

    frames: tuple[Frame, ...] = ()
    problem: str | None = None
    cpu_s: float = 0.0
    raw: bytes = field(default=b"", repr=False)


class Runner:
    """A worker that submissions can be given to, from several threads at once. Use it as a context."""

    def __init__(self, inputs: Inputs, guarded: bool = True) -> None:
        """Raises CourseError where the system cannot confine the worker and `guarded` asks for it."""
        if guarded and (missing := jail.why_not()):
            raise CourseError(
                f"students' code cannot be confined here: {missing}. With UNGUARDED=1 it runs with your "
                "rights: do this only in a virtual machine or container that holds nothing of value"
            )
        if not hasattr(os, "fork"):
            raise CourseError("grading needs a system with fork: use Linux, macOS, or WSL 2 on Windows")
        self._inputs, self._guarded = inputs, guarded
        self._lock, self._closing = threading.Lock(), ExitStack()

    def __enter__(self) -> "Runner":
        jail.hide_memory()
        with self._closing as closing:
            folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="homework-"))
            inputs = closing.enter_context(_file(self._inputs.content))
            self._channel, theirs = socket.socketpair()
            config = settings(self._inputs, self._guarded, theirs.fileno(), inputs.fileno())
            process = subprocess.Popen(
                [os.path.realpath(sys.executable), "-I", "-S", "-B", _WORKER, json.dumps(config)],
                pass_fds=(theirs.fileno(), inputs.fileno()),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,  # no file: the worker may write none
                start_new_session=True,
                env=_environment(folder),
            )
            closing.callback(_end, process)
            closing.callback(self._channel.close)  # first of all: then the worker ends by itself
            theirs.close()
            answer = self._receive()
            if "ready" not in answer:
                raise CourseError(_why_not_ready(answer, process.stderr.read()))
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def run(self, notebooks: Mapping[str, bytes]) -> Answers:
        """Run a submission.

        Args:
            notebooks: the bytes of its notebooks, by their names.

        Raises:
            CourseError: if the worker has ended.
        """
        ours, theirs = os.pipe()
        with _file(b"".join(notebooks.values())) as file, os.fdopen(ours, "rb", buffering=0) as answers:
            sizes = {name: len(raw) for name, raw in notebooks.items()}
            pid = self._ask({"run": sizes}, (file.fileno(), theirs))["pid"]
            os.close(theirs)
            try:
                received, problem = _read(answers, SUBMISSION_SECONDS)
            finally:
                cpu_s = self._ask({"end": pid})["cpu_s"]
        return answers_in(received, problem, cpu_s)

    def _ask(self, request: dict, files: tuple[int, ...] = ()) -> dict:
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(request).encode()], files)
            answer = self._receive()
        if not answer:
            raise CourseError(
                "the process that runs students' code has ended; run `make grade` again to go on"
            )
        return answer

    def _receive(self) -> dict:
        message = self._channel.recv(4096)
        return json.loads(message) if message else {}


_WORKER = str(Path(__file__).with_name("worker.py"))


def settings(inputs: Inputs, guarded: bool, channel: int, file: int) -> dict:
    """What the worker is told at its start."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return {
        "channel": channel,
        "inputs": file,
        "chapters": inputs.chapters,
        "notebooks": inputs.notebooks,
        "package": str(inputs.package),
        "tools": str(ROOT / "tools"),
        "site_packages": packages,
        "guarded": guarded,
        "readable": readable(inputs.package, packages) if guarded else [],
        "cpu_s": CPU_SECONDS,
        "seconds": SECONDS,
        "memory": MEMORY,
    }


def readable(package: Path, site_packages: list[str]) -> list[str]:
    """What students' code may read: Python, the libraries, what was handed out; no other lecture26."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [path for path in library.iterdir() if path.name not in ("site-packages", "dist-packages")]
    for folder in site_packages:
        others = (path for path in Path(folder).iterdir() if "lecture26" not in path.name)
        found += [path for path in others if path.suffix != ".pth"]
    system = ("/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
    return [str(package / "lecture26"), *map(str, found), *system]


def _environment(folder: str) -> dict[str, str]:
    """Of the grader's own environment, nothing is handed on."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", **one_thread}


def _file(content: bytes) -> tempfile._TemporaryFileWrapper:
    """An open file without a name, at its beginning."""
    file = tempfile.TemporaryFile()
    file.write(content)
    file.flush()
    file.seek(0)
    return file


def _end(process: subprocess.Popen) -> None:
    """The worker ends its children when its channel is closed; what is left after that is ended by force."""
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _why_not_ready(answer: dict, errors: bytes) -> str:
    if "holes" in answer:
        return (
            "students' code cannot be confined here: with Landlock and seccomp switched on, a process "
            f"can still {', '.join(answer['holes'])}. With UNGUARDED=1 it runs with your rights"
        )
    return f"the process that runs students' code did not start:\n{errors.decode(errors='replace')[-3000:]}"


def _read(pipe: object, seconds: float) -> tuple[bytes, str | None]:
    """All that comes, and what ended it early."""
    deadline, received = time.monotonic() + seconds, bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return bytes(received), f"it has not ended after {seconds:g} s"
            part = pipe.read(1 << 16)
            if not part:
                return bytes(received), None
            received += part
            if len(received) > MAX_ANSWERS:
                return bytes(received[:MAX_ANSWERS]), "it gives too much"


def answers_in(received: bytes, problem: str | None, cpu_s: float) -> Answers:
    """The frames in what has been received, up to the first that is not whole."""
    frames, position = [], 0
    try:
        while position < len(received):
            (size,) = LENGTH.unpack_from(received, position)
            position += LENGTH.size
            about = json.loads(received[position : position + size])
            position += size
            payloads = []
            for length in about["sizes"]:
                if position + length > len(received):
                    raise ValueError("a payload is cut off")
                payloads.append(received[position : position + length])
                position += length
            frames.append(Frame(about, tuple(payloads)))
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        problem = problem or "its process ended early"
    if problem is None and not (frames and "end" in frames[-1].about):
        problem = "its process ended early"
    return Answers(tuple(frames), problem, cpu_s, received)
