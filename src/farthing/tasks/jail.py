"""Runs one program with nothing to reach, as a script of its own: no part of Farthing is imported.

`python -I jail.py '{"argv": …}'` leaves for namespaces of its own if it is told to (user, mount, network, processes,
IPC), where it sees a read-only system and a small scratch folder; sets limits; forbids by seccomp what a solution to a
problem never needs (further processes, sockets, signals to others, mounts, tracing); and becomes the program. It dies
with whoever started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

_SCRATCH_BYTES = 64 * 2**20
_FILE_BYTES = 16 * 2**20
_OPEN_FILES = 64
_LIBC = ctypes.CDLL(None, use_errno=True)

# Numbers of the system calls that are refused, by machine: x86_64's, aarch64's.
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203),
    "kill": (62, 129), "tkill": (200, 130), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "setpriority": (141, 140), "mknodat": (259, 33),
    "memfd_create": (319, 279), "setsid": (112, 157), "setpgid": (109, 154), "prlimit64": (302, 261),
    "clone3": (435, 435), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "reboot": (169, 142), "acct": (163, 89),
    "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112), "swapon": (167, 224),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "iopl": (172, None), "ioperm": (173, None), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
}  # fmt: skip
_CLONE, _TGKILL, _AUDIT = (56, 220), (234, 131), (0xC000003E, 0xC00000B7)
_MACHINES = {"x86_64": 0, "aarch64": 1}
_CLONE_THREAD = 0x10000
_NEW = (
    0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000
)  # user, mount, net, pid, IPC, names


def main(given: dict) -> None:
    _die_with_parent()
    if given["namespaces"]:
        _leave(given)
    for what, most in (
        (resource.RLIMIT_AS, given["memory"]),
        (resource.RLIMIT_CPU, given["cpu"]),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if given["seccomp"] or given["landlock"]:
        _do(_LIBC.prctl(38, 1, 0, 0, 0))  # no new privileges
    if given["landlock"]:
        _landlock(given)
    if given["seccomp"]:
        forbid()
    os.execve(given["argv"][0], given["argv"], given["env"])


def forbid() -> None:
    """Refuse system calls from here on, for this process and what it becomes."""
    at = _MACHINES[platform.machine()]
    load, equal, give, bits = 0x20, 0x15, 0x06, 0x45
    refuse, no_call, allow, kill = 0x00050001, 0x00050026, 0x7FFF0000, 0x80000000  # EPERM, ENOSYS

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    program = [op(load, 4), op(equal, _AUDIT[at], 1), op(give, kill), op(load, 0)]
    if at == 0:  # the 32-bit calls of x32 have numbers of their own
        program += [op(0x35, 0x40000000, 0, 1), op(give, kill)]
    for name, numbers in _REFUSED.items():
        number = numbers[at]
        if number is not None:
            program += [op(equal, number, 0, 1), op(give, no_call if name == "clone3" else refuse)]
    # a thread may be made, a process not
    program += [
        op(equal, _CLONE[at], 0, 4),
        op(load, 16),
        op(bits, _CLONE_THREAD, 1),
        op(give, refuse),
        op(give, allow),
    ]
    # a signal may go to oneself, as abort() sends it
    program += [
        op(equal, _TGKILL[at], 0, 4),
        op(load, 16),
        op(equal, os.getpid(), 1),
        op(give, refuse),
        op(give, allow),
    ]
    program += [op(give, allow)]
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(buffer)))
    _do(_LIBC.prctl(22, 2, header, 0, 0))  # a filter


def _landlock(given: dict) -> None:
    """Allow reading what is readable, and everything in the scratch folder; nothing else of the file system."""
    create, add, restrict = 444, 445, 446
    version = _LIBC.syscall(create, None, 0, 1)
    if version < 1:
        raise OSError(ctypes.get_errno(), "no Landlock")
    handled = (1 << (13 + min(version - 1, 2))) - 1
    rules = _LIBC.syscall(create, struct.pack("=Q", handled), 8, 0)
    allowed = dict.fromkeys(given["readable"], 13) | {given["scratch"]: handled}
    for path, access in (allowed | {"/dev/null": 0b110, "/dev/zero": 0b100, "/dev/urandom": 0b100}).items():
        folder = os.open(path, os.O_PATH)
        _do(_LIBC.syscall(add, rules, 1, struct.pack("=Qi", access, folder), 0))
        os.close(folder)
    _do(_LIBC.syscall(restrict, rules, 0))
    os.close(rules)


def _leave(given: dict) -> None:
    """Go to namespaces of our own; returns in the process that becomes the program."""
    user, group = os.getuid(), os.getgid()
    _do(_LIBC.unshare(_NEW))
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    if child := os.fork():  # the first process of the new namespace; with it everything in there ends
        _end_as(child)
    _die_with_parent()
    _hide(given)
    if child := os.fork():  # the first process of a namespace is deaf to some signals
        _end_as(child)
    _die_with_parent()


def _hide(given: dict) -> None:
    """A root of our own: what is readable, the answer's folder, an empty scratch folder, and four devices."""
    private, bind, read_only = (
        0x44000,
        0x5000,
        0x5021 | 0x6,
    )  # the last: remount, bind, read-only, no setuid, no devices
    _mount(None, "/", None, private)
    root = given["root"]
    _mount("none", root, "tmpfs", 0x6, f"size={_SCRATCH_BYTES},mode=755")
    for path in given["readable"]:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            os.makedirs(root + path, exist_ok=True)
            _mount(path, root + path, None, bind)
            _mount(None, root + path, None, read_only)
    os.makedirs(root + "/dev")
    for device in ("null", "zero", "urandom", "random"):
        with open(f"{root}/dev/{device}", "w"):
            pass
        _mount(f"/dev/{device}", f"{root}/dev/{device}", None, bind)
    os.makedirs(root + given["scratch"])
    os.makedirs(root + "/old")
    _do(_LIBC.pivot_root(root.encode(), (root + "/old").encode()))
    os.chdir("/")
    _do(_LIBC.umount2(b"/old", 2))
    os.rmdir("/old")
    os.chdir(given["scratch"])


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _do(_LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def _end_as(child: int) -> None:
    """Wait for a child and end as it ended."""
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _die_with_parent() -> None:
    _do(_LIBC.prctl(1, signal.SIGKILL, 0, 0, 0))


def _do(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"jail: {error!r}\n".encode())
        os._exit(99)
