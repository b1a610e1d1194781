"""Confine this process and its children on Linux, without root and without other programs.

Landlock (Linux 5.13 and later): nothing but the given paths can be read, nothing at all written. seccomp: of
the kernel's calls only those that numeric Python needs; no new process, no program, no socket, no signal to
another process, no look into one, no change of a file's mode, owner or times. Both hold until the process
ends, for its children as well. What a process could still do: see that a file exists, use the processor and
memory up to its limits.

On other systems, and on older kernels, `why_not` says in words what is missing.
"""

import ctypes
import os
import platform
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

# <linux/landlock.h>; the three calls have the same numbers on all machines
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION_FLAG = 1
PATH_BENEATH = 1
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many rights a version knows; later ones know as many
TCP = 0b11  # bind and connect, from version 4
SCOPES = 0b11  # abstract sockets and signals, from version 6

# <linux/prctl.h>, <linux/seccomp.h>, <linux/filter.h>
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # where they stand in what a filter sees
ALLOW, END_PROCESS, REFUSE, UNKNOWN = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, the kernel's name for it
X32 = 0x40000000  # calls of a second set on x86_64
NEW_THREAD = 0x00010000  # a flag of clone

# what a confined process may call, with its number on x86_64 and on aarch64
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "open": (2, None),
    "openat": (257, 56),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "arch_prctl": (158, None),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getcpu": (309, 168),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "select": (23, None),
    "pselect6": (270, 72),
    "poll": (7, None),
    "ppoll": (271, 73),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
CLONE, CLONE3 = (56, 220), 435


def why_not() -> str | None:
    """What this system lacks to confine a process, as a sentence; None if it can."""
    if sys.platform != "linux":
        return f"this system ({platform.system()}) has neither Landlock nor seccomp: use Linux, or WSL 2"
    if platform.machine() not in MACHINES:
        return f"the numbers of the kernel's calls are known for {' and '.join(MACHINES)} only"
    if sys.maxsize < 2**32 or sys.byteorder != "little":
        return "Python must be a 64-bit one"
    if landlock_version() == 0:
        return "this kernel has no Landlock, or it is switched off (Linux 5.13 and later can have it)"
    return None


def landlock_version() -> int:
    """The version of Landlock's interface that the kernel has; 0 if it has none."""
    if sys.platform != "linux":
        return 0
    found = _libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION_FLAG))
    return max(0, found)


def holes(folder: str) -> list[str]:
    """What a confined process can do although it must not, in words; to be asked in one that may be lost.

    folder: one in which it could write if it were not confined.
    """
    trials = {
        "see files outside of the libraries": lambda: os.listdir("/"),
        "write files": lambda: open(os.path.join(folder, "written"), "w"),
        "change the mode of files": lambda: os.chmod(folder, 0o700),
        "open sockets": lambda: socket.socket(),
        "start processes": lambda: os.fork() or os._exit(0),
        "signal other processes": lambda: os.kill(os.getppid(), 0),
    }
    found = []
    for what, trial in trials.items():
        try:
            trial()
            found.append(what)
        except OSError:
            pass
    return found


def see_only(readable: Iterable[str | Path]) -> None:
    """From now on only these files and folders can be read, and nothing can be written.

    Paths that do not exist are passed over. Raises OSError where the kernel refuses.
    """
    version = landlock_version()
    rights = (1 << FILE_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("QQQ", rights, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24  # older kernels know a shorter structure
    rules = _call(CREATE_RULESET, attributes[:size], ctypes.c_size_t(size), ctypes.c_uint32(0))
    for path in readable:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        allowed = (
            READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0)
        )  # libraries are mapped to execute
        _call(ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", allowed, beneath), ctypes.c_uint32(0))
        os.close(beneath)
    _keep_privileges_down()
    _call(RESTRICT_SELF, rules, ctypes.c_uint32(0))
    os.close(rules)


def compute_only() -> None:
    """From now on the kernel refuses all calls of this process but those in ALLOWED, and new threads.

    Raises OSError where the kernel does not take the filter.
    """
    program = filter_for(platform.machine())
    code = b"".join(struct.pack("HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code)
    pointer = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _keep_privileges_down()
    if _libc().prctl(SET_SECCOMP, SECCOMP_MODE_FILTER, pointer, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def end_with_parent() -> None:
    """Let the kernel end this process when the one that made it has ended. Does nothing but on Linux."""
    if sys.platform == "linux":
        _libc().prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """Forbid other processes of the same user to look into this one. Does nothing but on Linux."""
    if sys.platform == "linux":
        _libc().prctl(SET_DUMPABLE, 0, 0, 0, 0)


def filter_for(machine: str) -> list[tuple[int, int, int, int]]:
    """A machine's filter, in steps: (what, steps to skip if so, steps to skip if not, number)."""
    column, architecture = MACHINES[machine]
    steps = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, END_PROCESS),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, REFUSE),
    ]
    for numbers in ALLOWED.values():
        if numbers[column] is not None:
            steps += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]
    return [
        *steps,
        # the flags of clone3 cannot be seen from here: told that there is none, the C library takes clone
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, UNKNOWN),
        (EQUAL, 0, 3, CLONE[column]),
        (LOAD, 0, 0, ARGUMENTS),
        (ANY_BIT, 0, 1, NEW_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]


def _keep_privileges_down() -> None:
    """Give up ever getting more rights; without that the kernel takes no restriction."""
    if _libc().prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"no_new_privs: {os.strerror(ctypes.get_errno())}")


def _call(number: int, *arguments: object) -> int:
    result = _libc().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
