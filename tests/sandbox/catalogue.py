"""The threat catalogue: hostile and faulty programs by theme, and how each must end.

Each runs on the input `private`, to an expected output that no program prints. What a program prints after
"REACHED" would be a hole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlef_sandbox import Layer, Verdict, worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Threat:
    """A program and how it must end."""

    tries: str
    program: str
    verdict: Verdict
    stdout: str | None = None  # what it must print, where that tells whether it got anything
    error: str = ""  # what the last line of its traceback must hold; empty: there is none
    limits: dict[str, float] = field(default_factory=dict)
    rests_on: frozenset[Layer] = frozenset()  # without one of these it ends in another way, or succeeds

    @property
    def name(self) -> str:
        return self.tries.replace(" ", "_")


def killed(tries: str, program: str) -> Threat:
    """It makes a system call that no honest program makes."""
    return Threat(tries=tries, program=program, verdict=Verdict.SECURITY)


def refused(tries: str, program: str, error: str = "[Errno 1] ", *, rests_on: frozenset[Layer] = frozenset()) -> Threat:  # fmt: skip
    """The kernel says no, and the program does not catch that."""
    return Threat(tries=tries, program=program, verdict=Verdict.EXCEPTION, error=error, rests_on=rests_on)


def futile(tries: str, program: str, stdout: str = "", *, rests_on: frozenset[Layer] = frozenset(), **limits: float) -> Threat:  # fmt: skip
    """It ends well, having got what it prints and no more."""
    return Threat(tries=tries, program=program, verdict=Verdict.WRONG_OUTPUT, stdout=stdout, limits=limits, rests_on=rests_on)  # fmt: skip


def ended(verdict: Verdict, tries: str, program: str, error: str = "", **limits: float) -> Threat:
    return Threat(tries=tries, program=program, verdict=verdict, error=error, limits=limits)


CALL = """import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    print('REACHED')
"""

MACHINE_CODE = """import ctypes, mmap
def execute(code):
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    print('REACHED', ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""

NETWORK = (
    killed("open a TCP socket", "import socket\nsocket.socket()"),
    killed("open a UDP socket", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)"),
    killed("open a raw socket", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    killed("open an IPv6 socket", "import socket\nsocket.socket(socket.AF_INET6)"),
    killed("open a netlink socket", "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    killed("open a packet socket", "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    killed("open a vsock socket", "import socket\nsocket.socket(socket.AF_VSOCK)"),
    killed("open a bluetooth socket", "import socket\nsocket.socket(31, socket.SOCK_RAW, 1)"),
    killed("open a kernel crypto socket", "import socket\nsocket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"),
    killed("open a CAN bus socket", "import socket\nsocket.socket(socket.AF_CAN, socket.SOCK_RAW)"),
    killed("open an express data path socket", "import socket\nsocket.socket(44, socket.SOCK_RAW)"),
    killed(
        "open a socket of every family",
        "import socket\nfor family in range(2, 50):\n    try:\n        socket.socket(family); print('REACHED', family)\n"
        "    except OSError: pass",
    ),
    killed("look up a name", "import socket\nsocket.getaddrinfo('localhost', 80)"),
    killed("fetch a page", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1/')"),
    killed(
        "bind a pair's socket to a name", "import socket\na, b = socket.socketpair()\na.bind('\\0reached')"
    ),
    killed("connect a pair's socket", "import socket\na, b = socket.socketpair()\na.connect('/dev/log')"),
    killed("listen on a pair's socket", "import socket\na, b = socket.socketpair()\na.listen()"),
    refused("open a local socket", "import socket\nsocket.socket(socket.AF_UNIX)"),
    refused(
        "open a pair of internet sockets",
        "import socket\nsocket.socketpair(socket.AF_INET, socket.SOCK_STREAM)",
    ),
    refused(
        "send to a local address",
        "import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.sendto(b'x', '/dev/log')",
    ),
    refused(
        "send a message with an address",
        "import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\na.sendmsg([b'x'], [], 0, '/dev/log')",
    ),
    refused("pass a descriptor", "import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])"),
    refused("receive a descriptor", "import socket\na, b = socket.socketpair()\nsocket.recv_fds(a, 1, 1)"),
    refused(
        "send urgent data", "import socket\na, b = socket.socketpair()\na.send(b'x', socket.MSG_OOB)"
    ),
    refused(
        "receive urgent data", "import socket\na, b = socket.socketpair()\na.recv(1, socket.MSG_OOB)"
    ),
    refused(
        "attach a packet filter",
        "import socket\na, b = socket.socketpair()\na.setsockopt(socket.SOL_SOCKET, 26, bytes(16))",
    ),
)  # fmt: skip

STARTING = (
    killed("execute a shell", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo REACHED'])"),
    killed("execute the interpreter again", "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(\"REACHED\")'])"),
    killed("execute a descriptor", CALL + "libc.execveat(0, b'', None, None, 0x1000)"),
    killed("execute from a thread", "import os, threading\nthreading.Thread(target=os.execv, args=['/bin/sh', ['sh']]).start()"),
    refused("execute a file in memory", "import os\nos.execv(os.memfd_create('x'), ['x'])"),
    refused("fork", "import os\nos.fork()", "[Errno 11] "),
    refused("fork by system call", CALL + "call(57)", "[Errno 11] "),
    refused("vfork by system call", CALL + "call(58)", "[Errno 11] "),
    refused("clone a process that shares memory", CALL + "call(56, 0x4000 | 0x100 | 17, 0, 0, 0, 0)", "[Errno 11] "),
    refused("clone with the flags hidden in memory", CALL + "call(435, ctypes.create_string_buffer(88), 88)", "[Errno 38] "),
    refused("clone a sibling", CALL + "call(56, 0x8000 | 17, 0, 0, 0, 0)", "[Errno 11] "),
    killed("clone a thread into a new pid namespace", CALL + "call(56, 0x20000000 | 0x10000 | 0x900, 1, 0, 0, 0)"),
    refused("clone a thread that shares nothing", CALL + "call(56, 0x10000, 1, 0, 0, 0)", "[Errno 22] "),
    refused("run a command", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo REACHED'])", "[Errno 11] "),
    refused("spawn a command", "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'echo REACHED'], {})", "[Errno 11] "),
    refused("open a terminal of its own", "import pty\npty.spawn('/bin/sh')", "OSError: out of pty devices"),
    refused("start a process of multiprocessing", "import multiprocessing\nmultiprocessing.Process(target=print, args=['REACHED']).start()", "[Errno 11] "),
    refused("start a pool of processes", "from concurrent.futures import ProcessPoolExecutor\nprint('REACHED', ProcessPoolExecutor(1))", "[Errno 30] "),
    refused("become a daemon", "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass\nos._exit(0)", "[Errno 11] "),
    futile("run a command by system", "import os\nprint(os.system('echo REACHED'))", "32512\n"),
    futile(
        "drop a fork bomb",
        "import os\nmade = 0\nfor _ in range(1000):\n    try:\n        made += os.fork() >= 0\n    except OSError: pass\nprint(made)",
        "0\n",
    ),
    futile(
        "drop a fork bomb from every thread",
        "import os, threading\nmade = []\ndef fork():\n    for _ in range(100):\n        try:\n            made.append(os.fork())\n        except OSError: pass\n"
        "threads = [threading.Thread(target=fork) for _ in range(8)]\nfor thread in threads: thread.start()\nfor thread in threads: thread.join()\nprint(made)",
        "[]\n",
    ),
)  # fmt: skip

SIGNALS = (
    refused("kill the parent", "import os\nos.kill((os.getppid() or 1), 9)"),
    refused("stop the parent", "import os, signal\nos.kill((os.getppid() or 1), signal.SIGSTOP)"),
    refused("look whether the parent lives", "import os\nos.kill((os.getppid() or 1), 0)"),
    refused("kill everybody", "import os\nos.kill(-1, 9)"),
    refused("kill its group", "import os\nos.killpg(0, 9)"),
    refused("kill the group of pid 1", "import os\nos.kill(-1 << 20, 9)"),
    refused("kill pid 1", "import os\nos.kill(1, 9)"),
    refused("kill another's thread", CALL + "call(234, 1, 1, 9)"),
    refused("kill a thread by its number alone", CALL + "call(200, os.getpid(), 9)"),
    refused("queue a signal", CALL + "call(129, (os.getppid() or 1), 9, ctypes.create_string_buffer(128))"),
    refused("queue a signal to a thread", CALL + "call(297, 1, 1, 9, ctypes.create_string_buffer(128))"),
    refused("hold the parent by a descriptor", "import os\nos.pidfd_open((os.getppid() or 1))"),
    killed("signal by a descriptor", "import signal\nsignal.pidfd_send_signal(0, 9)"),
    refused("have the parent signalled when input comes", "import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, (os.getppid() or 1))"),
    refused("have signals of a lease", "import fcntl, os\nfcntl.fcntl(os.open(os.__file__, 0), fcntl.F_SETLEASE, fcntl.F_RDLCK)"),
    refused("have signals of a folder", "import fcntl, os\nfcntl.fcntl(os.open(os.path.dirname(os.__file__), 0), fcntl.F_NOTIFY, 0x80000004)"),
    refused("have a timer signal a thread of the parent", CALL + "call(222, 1, ctypes.create_string_buffer(64), ctypes.create_string_buffer(8))"),
    refused("leave the session", "import os\nos.setsid()"),
    refused("leave the process group", "import os\nos.setpgid(0, 0)"),
    refused("survive the parent", CALL + "call(157, 1, 0, 0, 0, 0)"),
    refused("adopt orphans", CALL + "call(157, 36, 1, 0, 0, 0)"),
    ended(
        Verdict.TIMEOUT,
        "loop deaf to every signal",
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        cpu_s=0.2,
    ),
    ended(Verdict.TIMEOUT, "catch the signal of the CPU limit", "import resource, signal\nsignal.signal(signal.SIGXCPU, lambda *_: None)\nresource.setrlimit(resource.RLIMIT_CPU, (1, -1))\nwhile True: pass", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "stop itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", wall_s=0.2),
    ended(Verdict.TIMEOUT, "wait for a signal that never comes", "import signal\nsignal.pause()", wall_s=0.2),
    ended(Verdict.TIMEOUT, "storm itself with alarms", "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\nwhile True: pass", cpu_s=0.2),
    ended(Verdict.EXCEPTION, "kill itself", "import os\nos.kill(os.getpid(), 9)"),
    ended(Verdict.EXCEPTION, "abort", "import os\nos.abort()"),
    ended(Verdict.EXCEPTION, "read from nowhere", "import ctypes\nctypes.string_at(0)"),
    ended(Verdict.EXCEPTION, "execute nonsense", MACHINE_CODE + "execute(b'\\x0f\\x0b')"),
)  # fmt: skip

OTHERS = (
    killed("trace the parent", CALL + "libc.ptrace(16, (os.getppid() or 1), 0, 0)"),
    killed("ask to be traced", CALL + "libc.ptrace(0, 0, 0, 0)"),
    killed("seize a process", CALL + "libc.ptrace(0x4206, 1, 0, 0)"),
    killed("read the parent's memory", CALL + "libc.process_vm_readv((os.getppid() or 1), None, 0, None, 0, 0)"),
    killed("write the parent's memory", CALL + "libc.process_vm_writev((os.getppid() or 1), None, 0, None, 0, 0)"),
    killed("compare with the parent", CALL + "libc.syscall(312, os.getpid(), (os.getppid() or 1), 1, 0, 0)"),
    killed("take a descriptor of the parent", CALL + "libc.syscall(438, 0, 3, 0)"),
    refused("advise the parent's memory", CALL + "call(440, 0, 0, 0, 4, 0)"),
    refused("move the parent's pages", CALL + "call(279, (os.getppid() or 1), 0, 0, 0, 0, 0)"),
    refused("let the parent be traced", CALL + "call(157, 0x59616D61, -1, 0, 0, 0)"),
    refused("limit the parent", "import os, resource\nresource.prlimit((os.getppid() or 1), resource.RLIMIT_CPU, (1, 1))"),
    refused("read the parent's limits", "import os, resource\nprint('REACHED', resource.prlimit((os.getppid() or 1), resource.RLIMIT_CPU))"),
    refused("wait for another's child", "import os\nos.waitpid(-1, 0)", "[Errno 10] "),
    futile(
        "see other processes",
        "import os\nseen = []\nfor pid in range(1, 5000):\n    try:\n        os.getpgid(pid); seen.append(pid)\n    except OSError: pass\nprint(seen[0], len(seen) <= 3, seen[-1] == os.getpid())",
        "1 True True\n",  # the first of the namespace, a solution process perhaps, and itself
        rests_on=frozenset({Layer.PID_NAMESPACE}),
    ),
    futile(
        "find the expected output in memory",
        "import gc, sys\nfound = []\nfor thing in gc.get_objects():\n    if isinstance(thing, (dict, list, tuple)):\n"
        "        found += [1 for value in (thing.values() if isinstance(thing, dict) else thing) if isinstance(value, (str, bytes)) and ''.join(['ne', 'ver']) == value]\nprint(len(found))",
        "0\n",
    ),
    futile(
        "find the expected output in the frames",
        "import sys\nframe, found = sys._getframe(), []\nwhile frame.f_back:\n    frame = frame.f_back\n    found += [name for name, value in frame.f_locals.items() if 'nev' + 'er' in repr(value)]\nprint(found)",
        "[]\n",
    ),
    refused(
        "start a sandbox of its own by the frames",
        "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\ncore = next(module for module in frame.f_globals.values() if hasattr(module, 'Supervisor'))\nprint('REACHED')",
        "StopIteration",
    ),
    ended(
        Verdict.EXCEPTION,
        "serve as a worker by the frames",
        "import sys\nframe = sys._getframe(2)\nwhile 'core' not in frame.f_locals: frame = frame.f_back\n"
        "frame.f_locals['core'].serve(socket=3, supervisor=1, readable=['/'], hidden=[], compile=print, run=print)",
        "RuntimeError: /proc/self/statm",
    ),
)  # fmt: skip

# Calls that no honest program makes, by their numbers, and what they are for.
HOSTILE_CALLS = {
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "swapon": 167, "swapoff": 168, "quotactl": 179,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_setup": 206,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "add_key": 248, "request_key": 249, "keyctl": 250,
    "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320,
    "reboot": 169, "acct": 163, "syslog": 103, "personality": 135, "vhangup": 153,
    "iopl": 172, "ioperm": 173, "modify_ldt": 154, "sethostname": 170, "setdomainname": 171,
    "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305, "adjtimex": 159,
}  # fmt: skip

# Calls that an honest program may try and must not get.
FORBIDDEN_CALLS = {
    "inotify_init1": 294, "fanotify_init": 300, "signalfd4": 289, "timerfd_create": 283, "memfd_create": 319,
    "splice": 275, "tee": 276, "vmsplice": 278, "copy_file_range": 326, "sendfile": 40, "sendmmsg": 307,
    "remap_file_pages": 216, "mincore": 27, "mbind": 237, "set_mempolicy": 238, "migrate_pages": 256,
    "arch_prctl": 158, "pkey_alloc": 330, "openat2": 437, "sync": 162, "fallocate": 285, "fsetxattr": 190,
    "ustat": 136, "lookup_dcookie": 212,
}  # fmt: skip

# Calls that are newer than the policy's oldest kernel: they do not exist, as on that one.
NEWER_CALLS = {
    "landlock_create_ruleset": 444, "memfd_secret": 447, "process_mrelease": 448, "set_mempolicy_home_node": 450,
    "cachestat": 451, "map_shadow_stack": 453, "statmount": 457, "listmount": 458, "mseal": 462,
}  # fmt: skip

KERNEL = (
    *(killed(f"call {name}", CALL + f"libc.syscall({number}, 0, 0, 0, 0, 0)") for name, number in HOSTILE_CALLS.items()),
    *(refused(f"call {name}", CALL + f"call({number}, 0, 0, 0, 0, 0)") for name, number in FORBIDDEN_CALLS.items()),
    *(refused(f"call {name}", CALL + f"call({number}, 0, 0, 0, 0, 0)", "[Errno 38] ") for name, number in NEWER_CALLS.items()),
    refused("call what later kernels may have", CALL + "call(600, 0, 0, 0, 0, 0)", "[Errno 38] "),
    killed("call a hostile call with rubbish in the upper half", CALL + "libc.syscall(ctypes.c_long(165 | 1 << 40), 0, 0, 0, 0, 0)\nlibc.syscall(165, 0, 0, 0, 0, 0)"),
    killed("clone into a new user namespace", CALL + "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)"),
    killed("clone into a new mount namespace", CALL + "libc.syscall(56, 0x00020000 | 17, 0, 0, 0, 0)"),
    killed("clone into a new network namespace", CALL + "libc.syscall(56, 0x40000000 | 17, 0, 0, 0, 0)"),
    killed("take an x32 system call", CALL + "libc.syscall(0x40000000 | 39)"),
    killed("take the x32 form of execve", CALL + "libc.syscall(0x40000000 | 520, 0, 0, 0)"),
    killed("take an i386 system call by int 0x80", MACHINE_CODE + "execute(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')"),
    killed("take i386 execve by int 0x80", MACHINE_CODE + "execute(b'\\xb8\\x0b\\x00\\x00\\x00\\xcd\\x80\\xc3')"),
    killed("take a hostile call by machine code", MACHINE_CODE + "execute(b'\\xb8\\xa5\\x00\\x00\\x00\\x0f\\x05\\xc3')"),
    killed("escape a changed root", "import os\nos.chroot('/')\nfor _ in range(9): os.chdir('..')\nos.chroot('.')"),
)  # fmt: skip

RIGHTS = (
    refused("become root", "import os\nos.setresuid(0, 0, 0)"),
    refused("become root by setuid", "import os\nos.setuid(0)"),
    refused("join the root group", "import os\nos.setgroups([0])"),
    refused("gain capabilities", CALL + "call(126, ctypes.create_string_buffer(8), ctypes.create_string_buffer(24))"),
    refused("keep capabilities", CALL + "call(157, 8, 1, 0, 0, 0)"),
    refused("gain new privileges again", CALL + "call(157, 38, 0, 0, 0, 0)"),
    refused("install a filter", CALL + "call(317, 1, 0, ctypes.create_string_buffer(16))"),
    refused("install a filter by prctl", CALL + "call(157, 22, 2, ctypes.create_string_buffer(16), 0, 0)"),
    refused("dispatch system calls to itself", CALL + "call(157, 59, 1, 0, 0, 0)"),
    refused("rewrite its own process record", CALL + "call(157, 35, 1, 0, 0, 0)"),
    refused("become dumpable", CALL + "call(157, 4, 1, 0, 0, 0)"),
    refused("turn off the guard against speculation", CALL + "call(157, 53, 0, 2, 0, 0)"),
    ended(Verdict.EXCEPTION, "raise the memory limit", "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "not allowed to raise maximum limit"),
    ended(Verdict.EXCEPTION, "raise the output limit", "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))", "not allowed to raise maximum limit"),
    ended(Verdict.EXCEPTION, "raise the file limit", "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))", "not allowed to raise maximum limit"),
    ended(Verdict.EXCEPTION, "raise the core limit", "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (-1, -1))", "not allowed to raise maximum limit"),
    ended(Verdict.EXCEPTION, "raise the limit of locked memory", "import resource\nresource.setrlimit(resource.RLIMIT_MEMLOCK, (-1, -1))", "not allowed to raise maximum limit"),
    ended(Verdict.EXCEPTION, "raise the limit of message queues", "import resource\nresource.setrlimit(resource.RLIMIT_MSGQUEUE, (-1, -1))", "not allowed to raise maximum limit"),
    ended(Verdict.TIMEOUT, "raise the CPU limit", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\nwhile True: pass", cpu_s=0.2),
    refused("lock memory", CALL + "call(151, 3)"),
    refused("raise its priority", "import os\nos.nice(-5)"),
    refused("lower its priority", "import os\nos.setpriority(os.PRIO_PROCESS, 0, 19)"),
    refused("run in real time", "import os\nos.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    refused("run before all others by deadline", CALL + "call(314, 0, ctypes.create_string_buffer(48), 0)"),
    refused("choose its cores", "import os\nos.sched_setaffinity(0, {0})"),
    refused("choose its disk priority", CALL + "call(251, 1, 0, 0)"),
    futile(
        "be somebody",
        "import os\nprint(0 in os.getresuid() + os.getresgid(), os.getgroups())",
        "False []\n",
        rests_on=frozenset({Layer.UNPRIVILEGED_USER}),
    ),
    futile(
        "hold a capability",
        "import ctypes\nheader, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\nctypes.CDLL(None).capget(header, data)\nprint(list(data))",
        "[0, 0, 0, 0, 0, 0]\n",
    ),
    futile("find a capability to regain", "import ctypes\nprint(sum(ctypes.CDLL(None).prctl(23, number) == 1 for number in range(41)))", "0\n"),
)  # fmt: skip

SHARING = (
    refused("map shared memory", "import mmap\nmmap.mmap(-1, 4096)"),
    refused(
        "hold memory by the last page of a map",
        CALL + "libc.mmap.restype = ctypes.c_void_p\nsize = 64 << 20\nfor _ in range(16):\n"
        "    address = libc.mmap(None, ctypes.c_size_t(size), 3, 0x21, -1, 0)\n    if address == 2**64 - 1: raise OSError(ctypes.get_errno(), 'mmap')\n"
        "    ctypes.memset(address, 1, size)\n    libc.munmap(ctypes.c_void_p(address + 4096), ctypes.c_size_t(size - 4096))\nprint('REACHED')",
    ),
    refused("map shared memory by its newer flag", CALL + "call(9, 0, 4096, 3, 0x23, -1, 0)"),
    refused("lock a file of the library", "import fcntl, os\nfcntl.flock(os.open(os.__file__, 0), fcntl.LOCK_EX)"),
    refused("hoard locks on a file", "import fcntl\nfor at in range(0, 10**6, 2): fcntl.lockf(0, fcntl.LOCK_SH, 1, at)"),
    refused("make shared memory", CALL + "call(29, 0, 4096, 0o1600)"),
    refused("attach shared memory", CALL + "call(30, 0, 0, 0)"),
    refused("remove shared memory", CALL + "call(31, 0, 0, 0)"),
    refused("make a message queue", CALL + "call(68, 0, 0o1600)"),
    refused("make a semaphore", CALL + "call(64, 0, 1, 0o1600)"),
    refused("make a named message queue", CALL + "call(240, b'reached', 0o102, 0o600, 0)"),
    refused("remove a named message queue", CALL + "call(241, b'reached')"),
    refused("make named shared memory", "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=10)", "[Errno 30] "),
    refused("make a named semaphore", "import multiprocessing\nmultiprocessing.Lock()", "[Errno 30] "),
    refused("type into the terminal", "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')", "[Errno 25] "),
    refused("type into the terminal by standard output", "import fcntl, termios\nfcntl.ioctl(1, termios.TIOCSTI, b'x')", "[Errno 25] "),
    refused("take the terminal", "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 1)", "[Errno 25] "),
    refused("paste into the console", "import fcntl\nfcntl.ioctl(0, 0x541C, b'\\x03')", "[Errno 25] "),
    refused("configure a network interface", "import fcntl, socket\na, b = socket.socketpair()\nfcntl.ioctl(a, 0x8914, bytes(40))", "[Errno 25] "),
    refused("open the terminal", "open('/dev/tty', 'w')", "[Errno 30] "),
)  # fmt: skip

NOT_THERE = frozenset({Layer.MOUNT_NAMESPACE})
CLOSED = frozenset({Layer.LANDLOCK})  # without it the folders above the library show the way to it

READING = (
    refused("read the passwords", "print('REACHED', open('/etc/passwd').read())", "[Errno "),
    refused("read the password hashes", "print('REACHED', open('/etc/shadow').read())", "[Errno "),
    refused("list processes", "import os\nprint('REACHED', os.listdir('/proc'))", "[Errno "),
    refused("open its memory file", "print('REACHED', open('/proc/self/mem', 'rb'))", "[Errno "),
    refused("write its memory file", "open('/proc/self/mem', 'r+b')", "[Errno 30] "),
    refused("read its memory map", "print('REACHED', open('/proc/self/maps').read())", "[Errno "),
    refused("read its environment file", "print('REACHED', open('/proc/self/environ').read())", "[Errno "),
    refused("read the caller's environment file", "import os\nprint('REACHED', open(f'/proc/{(os.getppid() or 1)}/environ').read())", "[Errno "),
    refused("list its descriptors", "import os\nprint('REACHED', os.listdir('/proc/self/fd'))", "[Errno "),
    refused("read the kernel's log", "print('REACHED', open('/dev/kmsg').read())", "[Errno "),
    refused("read physical memory", "print('REACHED', open('/dev/mem', 'rb').read(1))", "[Errno "),
    refused("read the disk", "print('REACHED', open('/dev/vda', 'rb').read(1))", "[Errno "),
    refused("read the system's settings", "print('REACHED', open('/sys/kernel/vmcoreinfo').read())", "[Errno "),
    refused("list the home folder", "import os\nprint('REACHED', os.listdir('/home'))", "[Errno ", rests_on=CLOSED),
    refused("list root's home folder", "import os\nprint('REACHED', os.listdir('/root'))", "[Errno ", rests_on=CLOSED),
    refused("list temporary files", "import os\nprint('REACHED', os.listdir('/tmp'))", "[Errno ", rests_on=CLOSED),
    refused("read the tests", f"print('REACHED', open({__file__!r}).read())", "[Errno "),
    refused("read an expected output beside it", "print('REACHED', open('expected_output.txt').read())", "[Errno 2] "),
    refused("read the program's file", "print('REACHED', open(__file__).read())", "[Errno 2] "),
    refused("read the sandbox's own files", f"print('REACHED', open({worker.__file__!r}).read())", "[Errno "),
    refused("walk up out of the root", "print('REACHED', open('../../../../../../etc/hostname').read())", "[Errno "),
    refused("walk up by a descriptor", "import os\nroot = os.open('/', os.O_PATH)\nprint('REACHED', os.read(os.open('../../etc/hostname', 0, dir_fd=root), 9))", "[Errno "),
    refused("import installed packages", "import pip", "ModuleNotFoundError"),
    refused(
        "import installed packages by their path",
        "import os, sys\nsys.path.append(os.path.join(os.path.dirname(os.__file__), 'site-packages'))\nimport pip\nprint('REACHED')",
        "ModuleNotFoundError",
        rests_on=NOT_THERE,
    ),
    refused("read a file by a pathname with a NUL", "print('REACHED', open('/etc/passwd\\0.py').read())", "ValueError: embedded null byte"),
    futile("find the caller's environment", "import os\nprint(sorted(os.environ), os.getcwd())", "['LC_CTYPE', 'LD_BIND_NOW', 'PYTHONHASHSEED'] /\n", rests_on=NOT_THERE),
    futile("find the caller's arguments", "import sys\nprint(sys.argv)", "['solution.py']\n"),
    futile("find the workers arguments", "import sys\nprint(sys.orig_argv == [sys.executable, 'solution.py'])", "True\n"),
    futile(
        "find an open descriptor",
        "import fcntl\nfor fd in range(1024):\n    try:\n        fcntl.fcntl(fd, fcntl.F_GETFD); print(fd, end=' ')\n    except OSError: pass",
        "0 1 2 ",
    ),
    futile("find another's input behind its own", "import os\nos.lseek(0, 0, 0)\nprint(os.read(0, 100), os.fstat(0).st_size)", "b'private\\n' 8\n"),
    futile("read what is in standard output", "import os\nprint(os.pread(1, 100, 0))", "b''\n"),
)  # fmt: skip

WRITING = (
    refused("write a file", "open('/tmp/reached', 'w')", "[Errno 30] "),
    refused("write in the working folder", "open('reached', 'w')", "[Errno 30] "),
    refused("append to the library", "import os\nopen(os.__file__, 'a')", "[Errno 30] "),
    refused("empty a file that it can read", "import os\nos.open(os.__file__, os.O_RDONLY | os.O_TRUNC)", "[Errno 30] "),
    refused("truncate the library", "import os\nos.truncate(os.__file__, 0)"),
    refused("map the library for writing", "import mmap, os\nfile = os.open(os.__file__, 0)\nmmap.mmap(file, 4096)[0] = 1", "[Errno 13] "),
    refused("make an unnamed file", "import os\nos.open('/tmp', os.O_TMPFILE | os.O_RDWR)", "[Errno 30] "),
    refused("make a temporary file", "import tempfile\ntempfile.TemporaryFile()", "[Errno 2] No usable temporary directory"),
    refused("make a folder", "import os\nos.mkdir('/tmp/reached')"),
    refused("make a named pipe", "import os\nos.mkfifo('/reached')"),
    refused("make a device", "import os, stat\nos.mknod('/reached', stat.S_IFBLK | 0o666, os.makedev(254, 0))"),
    refused("make a symbolic link", "import os\nos.symlink('/etc', '/reached')"),
    refused("make a hard link", "import os\nos.link(os.__file__, '/reached')"),
    refused("remove a file", "import os\nos.remove(os.__file__)"),
    refused("remove a folder", "import os\nos.rmdir('/tmp')"),
    refused("rename a file", "import os\nos.rename(os.__file__, '/x')"),
    refused("change a mode", "import os\nos.chmod(os.__file__, 0o777)"),
    refused("make standard input executable", "import os\nos.fchmod(0, 0o777)"),
    refused("change an owner", "import os\nos.chown(os.__file__, 0, 0)"),
    refused("change a time", "import os\nos.utime(os.__file__)"),
    refused("set an attribute", "import os\nos.setxattr(os.__file__, 'user.reached', b'x')"),
    refused("write bytecode for later imports", "import json, py_compile\nprint('REACHED', py_compile.compile(json.__file__))", "[Errno "),
    refused("change its input", "import os\nos.ftruncate(0, 0)"),
    refused("write its input", "import os\nos.pwrite(0, b'x', 0)"),
    refused("map its input for writing", "import mmap\nmmap.mmap(0, 0)[0] = 1"),
    refused("unseal its input", "import fcntl\nfcntl.fcntl(0, fcntl.F_ADD_SEALS, 0)"),
    refused("seal its output", "import fcntl\nfcntl.fcntl(1, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)"),
    refused("drop an inode bomb", "import os\nfor number in range(10**6): os.mkdir(f'/tmp/reached{number}')"),
    refused("drop a file bomb", "kept = []\nwhile True: kept.append(open('/tmp/reached' + str(len(kept)), 'w'))", "[Errno 30] "),
)  # fmt: skip

USING_UP = (
    ended(Verdict.TIMEOUT, "loop for ever", "while True: pass", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "sleep for ever", "import time\ntime.sleep(1e6)", wall_s=0.2),
    ended(Verdict.TIMEOUT, "wait for a lock for ever", "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", wall_s=0.2),
    ended(Verdict.TIMEOUT, "wait for a thread that never ends", "import threading\nthreading.Thread(target=threading.Event().wait).start()", wall_s=0.2),
    ended(Verdict.TIMEOUT, "wait for an empty pipe", "import os\nos.read(os.pipe()[0], 1)", wall_s=0.2),
    ended(Verdict.TIMEOUT, "wait for a full pipe", "import os\nend = os.pipe()[1]\nwhile True: os.write(end, b'x' * 65536)", wall_s=0.2),
    ended(Verdict.TIMEOUT, "match a regular expression for ever", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "raise a huge power", "pow(7, 10**9)", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "multiply huge integers", "x = 1 << 10**7\nwhile True: x * x % 3", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "sum an endless range", "print(sum(range(10**15)))", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "collide hashes", "kept = {}\nfor number in range(10**6): kept[number * (2**61 - 1)] = 1", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "share its CPU time among threads", "import hashlib, threading\ndef burn():\n    while True: hashlib.sha256(bytes(1 << 20))\nfor _ in range(4): threading.Thread(target=burn).start()", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "leave its threads running", "import ctypes, threading\ndef burn():\n    while True: pass\nthreading.Thread(target=burn).start()\nctypes.CDLL(None).syscall(60, 0)", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "loop when it exits", "import atexit\n@atexit.register\ndef loop():\n    while True: pass", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "loop when it is collected", "class Late:\n    def __del__(self):\n        while True: pass\nkept = Late()", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "loop when its output is flushed", "import sys\nclass Slow:\n    closed = False\n    def flush(self):\n        while True: pass\nsys.stdout = Slow()", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "catch every exception", "while True:\n    try:\n        while True: pass\n    except BaseException: pass", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "poll without end", "import os\nwhile True: os.getppid()", cpu_s=0.2),
    ended(Verdict.OUT_OF_MEMORY, "double a string for ever", "x = b'1'\nwhile True: x += x", "MemoryError", cpu_s=20.0, wall_s=60.0),
    ended(Verdict.OUT_OF_MEMORY, "keep small objects without end", "x = []\nwhile True: x.append(b'x' * len(x))", "MemoryError", cpu_s=20.0, wall_s=60.0),
    ended(Verdict.OUT_OF_MEMORY, "allocate it all at once", "x = bytearray(10**11)", "MemoryError"),
    ended(Verdict.OUT_OF_MEMORY, "shift a huge integer", "1 << 10**12", "MemoryError"),
    ended(Verdict.OUT_OF_MEMORY, "allocate by repetition", "[0] * 10**11", "MemoryError"),
    ended(Verdict.OUT_OF_MEMORY, "use more than the limit and end well", "x = b'x' * (96 << 20)", memory_bytes=64 << 20),
    ended(Verdict.OUT_OF_MEMORY, "map memory that nobody counts", "import mmap\nx = mmap.mmap(-1, 96 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nx.write(b'x' * (96 << 20))", memory_bytes=64 << 20),
    ended(Verdict.OUT_OF_MEMORY, "give memory back before the end", "x = b'x' * (96 << 20)\ndel x\nprint('never')", memory_bytes=64 << 20),
    ended(Verdict.EXCEPTION, "map more than there is", "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))", "[Errno 12] "),
    ended(Verdict.EXCEPTION, "recurse without end", "def f():\n    f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ended(Verdict.OUT_OF_MEMORY, "recurse past the memory limit", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()"),
    ended(Verdict.OUT_OF_MEMORY, "grow the stack past the memory limit", MACHINE_CODE + "execute(b'\\xe8\\xfb\\xff\\xff\\xff')"),  # a call of itself
    ended(Verdict.EXCEPTION, "compare what holds itself", "a = []; b = [a]; a.append(b)\na == [b]\nwhile True: a == b", "RecursionError"),
    ended(Verdict.EXCEPTION, "open descriptors without end", "import os\nwhile True: os.dup(0)", "[Errno 24] "),
    ended(Verdict.EXCEPTION, "print a huge integer", "print(10**5000)", "ValueError: Exceeds the limit (4300"),
    ended(Verdict.EXCEPTION, "parse a huge integer", "int('9' * 10**6)", "ValueError: Exceeds the limit (4300"),
    ended(Verdict.OUTPUT_LIMIT, "print for ever", "while True: print('x' * 4096)"),
    ended(Verdict.OUTPUT_LIMIT, "print for ever to standard error", "import sys\nwhile True: sys.stderr.write('x' * 4096)"),
    ended(Verdict.OUTPUT_LIMIT, "stretch its output", "import os\nos.ftruncate(1, 1 << 40)"),
    ended(Verdict.OUTPUT_LIMIT, "write far behind the end", "import os\nos.pwrite(1, b'x', 1 << 40)"),
    ended(Verdict.OUTPUT_LIMIT, "warn for ever", "import warnings\nwarnings.simplefilter('always')\nwhile True: warnings.warn('x' * 4096)"),
    ended(Verdict.EXCEPTION, "print for ever deaf to the signal", "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwhile True: print('x' * 4096)", "[Errno 27] "),
    futile("print a number of a million digits", "print('9' * 10**6)", "9" * (64 << 10)),
    futile("print half a million words", "print('0 ' * 500_000)", "0 " * (32 << 10)),
    futile(
        "drop a thread bomb",
        "import os, threading, time\nthreading.stack_size(65536)\nmade = 0\ntry:\n    while made < 1000:\n"
        "        threading.Thread(target=time.sleep, args=[60], daemon=True).start()\n        made += 1\n"
        "except RuntimeError:\n    print(made, flush=True)\nos._exit(0)",
        "15\n",
        rests_on=frozenset({Layer.UNPRIVILEGED_USER, Layer.PID_NAMESPACE}),  # threads are counted by user, or by user namespace
        processes=16,
    ),
)  # fmt: skip

ENDING = (
    futile("leave with status 0", "import os\nos._exit(0)"),
    futile("leave with status 0 by system call", CALL + "libc.syscall(231, 0)"),
    futile("leave with status 256", "import os\nos._exit(256)"),
    futile("print nothing", ""),
    futile("close its streams", "import os\nos.close(0); os.close(1); os.close(2)"),
    futile("close a range of descriptors", CALL + "libc.syscall(436, 0, 1 << 20, 0)"),
    futile("lose its output object", "import sys\nprint('x', end='', flush=True)\nsys.stdout = None", "x"),
    futile("write half a line last", "import os\nos.write(1, b'nev')\nos._exit(0)", "nev"),
    futile("print NULs", "print('nev\\0er')", "nev\0er\n"),
    futile("print what is not UTF-8", "import os\nos.write(1, b'\\xff\\xfenever')", "\ufffd\ufffdnever"),
    futile("print half a character", "import os\nos.write(1, '\\u2603'.encode()[:2])", "\ufffd"),
    futile("rewind over its output", "import os\nos.write(1, b'never\\n'); os.lseek(1, 0, 0); os.write(1, b'X')", "Xever\n"),
    futile("change its output by a map", "import mmap, os\nos.write(1, b'never\\n')\nmmap.mmap(1, 0)[0] = 88", "Xever\n"),
    futile("take its output back", "import os\nprint('never', flush=True)\nos.ftruncate(1, 0)"),
    futile("write its output to standard error", "import sys\nprint('never', file=sys.stderr)"),
    futile("print the verdict", "print('passed')\nprint('{\"verdict\": \"passed\"}')", 'passed\n{"verdict": "passed"}\n'),
    ended(Verdict.EXCEPTION, "crash after the right answer", "print('never', flush=True)\n1 / 0", "ZeroDivisionError"),
    ended(Verdict.EXCEPTION, "leave with status 1 after the right answer", "print('never')\nexit(1)"),
    *(ended(Verdict.EXCEPTION, f"leave with status {status}", f"import os\nos._exit({status})") for status in (2, 120, 125, 126, 127, 128, 137, 250, 251, 255)),
    *(ended(Verdict.EXCEPTION, f"exit with {value}", f"exit({value})", error) for value, error in {"-1": "", "250": "", "'private'": "private", "[]": "[]", "2**64 + 1": "", "b'x'": "b'x'"}.items()),
    ended(Verdict.EXCEPTION, "close its output before the end", "import os\nprint('never')\nos.close(1)"),
    ended(Verdict.EXCEPTION, "raise an exception that cannot be shown", "class Dark(Exception):\n    def __str__(self): raise self\n    __repr__ = __str__\nraise Dark", "Dark: <"),
    ended(Verdict.EXCEPTION, "raise an exception without a traceback", "class Bare(Exception):\n    __traceback__ = property(lambda self: None)\nraise Bare", "Bare"),
    ended(Verdict.EXCEPTION, "raise a chain of exceptions without end", "a, b = Exception(), Exception()\na.__cause__, b.__cause__ = b, a\nraise a", "Exception"),
    ended(Verdict.EXCEPTION, "raise from the exception hook", "import sys\nsys.excepthook = lambda *_: 1 / 0\nraise Exception", "ZeroDivisionError"),
    ended(Verdict.EXCEPTION, "exit with a status that is no number", "class Status(int):\n    def __and__(self, other): return 'x'\nexit(Status(3))", "RuntimeError: Unable to cast"),
    ended(Verdict.EXCEPTION, "exit with a status past every number", "class Status(int):\n    def __and__(self, other): return 10**30\nexit(Status(3))", "RuntimeError: Unable to cast"),
    ended(Verdict.EXCEPTION, "read past the end", "input()\ninput()", "EOFError"),
    ended(Verdict.EXCEPTION, "interrupt itself", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    ended(Verdict.EXCEPTION, "end a generator by exit", "def f():\n    try:\n        yield\n    finally:\n        exit(3)\nnext(f())\nraise GeneratorExit", "GeneratorExit"),
)  # fmt: skip

# What a program does to its own interpreter ends with it.
POISONING = (
    futile("replace the builtins", "import builtins\nbuiltins.print = builtins.input = builtins.int = builtins.open = None"),
    ended(Verdict.EXCEPTION, "empty the builtins", "import builtins\nbuiltins.__dict__.clear()", "NameError"),
    futile("replace modules", "import sys\nfor name in ('json', 'math', 'random', 'os', 'io', 'traceback'): sys.modules[name] = None"),
    futile("empty the list of modules", "import sys\nsys.modules.clear()"),
    futile("change a module", "import math, random, json\nmath.pi = 3\nrandom.random = lambda: 4\njson.dumps = None"),
    futile("reseed the random numbers", "import random\nrandom.seed(7)\nrandom.setstate(random.getstate())"),
    futile("change the import path", "import sys\nsys.path[:] = ['/tmp']\nsys.meta_path.clear()\nsys.path_hooks.clear()"),
    futile("leave exit functions", "import atexit\nfor _ in range(1000): atexit.register(print, end='')"),
    ended(Verdict.EXCEPTION, "replace what runs exit functions", "import atexit\natexit._run_exitfuncs = lambda: 1 / 0", "ZeroDivisionError"),
    ended(Verdict.WRONG_OUTPUT, "exit while threads are ended", "import threading\nthreading.Thread(target=threading.Event().wait, args=[0.2]).start()\nthreading._shutdown = lambda: exit(0)", "SystemExit: 0"),
    futile("leave hooks of forks", "import os\nos.register_at_fork(before=lambda: 1 / 0, after_in_parent=lambda: 1 / 0, after_in_child=lambda: 1 / 0)"),
    futile("turn the collector off", "import gc\ngc.disable()\ngc.set_threshold(1)\ngc.unfreeze()\ngc.callbacks.append(lambda *_: 1 / 0)\ngc.set_debug(gc.DEBUG_SAVEALL)\ngc.set_debug(0)\ngc.callbacks.clear()"),
    futile("collect what the worker froze", "import gc\ngc.unfreeze()\ngc.collect()"),
    futile("leave signal handlers", "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, lambda *_: None)\n    except (OSError, ValueError): pass"),
    futile("leave signals blocked", "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))"),
    futile("leave an alarm", "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\nsignal.setitimer(signal.ITIMER_PROF, 0.05)"),
    futile("leave a trace function", "import sys, threading\nsys.settrace(lambda *_: None)\nsys.setprofile(lambda *_: None)\nthreading.settrace(lambda *_: None)\nsys.addaudithook(lambda *_: None)"),
    futile("change the interpreter's limits", "import sys\nsys.setrecursionlimit(60)\nsys.setswitchinterval(10)\nsys.set_int_max_str_digits(640)\nsys.tracebacklimit = 0"),
    # Of CPU time one second stays: with none, the kernel kills the program at its next tick, or at none before it ends.
    futile("lower every limit", "import os, resource\nfor limit in reversed(range(16)):\n    lowest = int(limit == resource.RLIMIT_CPU)\n    try:\n        resource.setrlimit(limit, (lowest, lowest))\n    except (OSError, ValueError): pass\nos._exit(0)"),
    futile("change the environment", "import os\nos.environ['PYTHONHASHSEED'] = '1'\nos.environ.pop('LC_CTYPE', None)\nos.chdir(os.path.dirname(os.__file__))\nos.umask(0)"),
    futile("change the locale", "import locale, decimal, time, os\ndecimal.getcontext().prec = 2\nos.environ['TZ'] = 'Asia/Tokyo'\ntime.tzset()\nlocale.setlocale(locale.LC_ALL, 'C')"),
    futile("change the standard streams", "import io, sys\nsys.stdin = sys.__stdin__ = io.StringIO('poison')\nsys.stdout = sys.__stdout__ = io.StringIO()\nsys.displayhook = None"),
    futile("change small integers", "import ctypes, os\nctypes.c_long.from_address(id(7) + 24).value = 8\nos._exit(0)"),
    futile("change a string that all share", "import ctypes, os\nctypes.c_char.from_address(id('join') + 48).value = b'X'\nos._exit(0)"),
    futile("change a type", "import ctypes, gc\ngc.get_referents(int.__dict__)[0]['bit_length'] = None\nctypes.pythonapi.PyType_Modified(ctypes.py_object(int))"),
    futile("overwrite the code of the interpreter", CALL + "address = ctypes.cast(libc.getpid, ctypes.c_void_p).value\nassert libc.mprotect(ctypes.c_void_p(address & -4096), 4096, 7) == 0\nctypes.memset(address, 0xC3, 1)\nos._exit(0)"),
    futile("change the worker's functions by the frames", "import sys\nscope = sys._getframe(1).f_globals\nscope['_finish'] = lambda *_: 0\nscope['_compile'] = scope['_run'] = None"),
    ended(Verdict.WRONG_OUTPUT, "forge its status by the frames", "import sys\nsys._getframe(1).f_globals['_finish'] = lambda *_: 0\n1 / 0", "ZeroDivisionError"),
    futile("change the remembered source", "import linecache\nlinecache.cache.clear()\nlinecache.getline = None"),
    futile("change the compiled code of a library", "import json\njson.dumps.__code__ = (lambda *_: 'poison').__code__"),
    ended(Verdict.TIMEOUT, "leave the interpreter's lock with a thread", "import ctypes, os, threading\nthreading.Thread(target=ctypes.PyDLL(None).usleep, args=[10**7], daemon=True).start()\nos._exit(0)", wall_s=0.2),
    futile("leave locks of the library taken", "import os, threading, logging, random\nkinds = type(threading.Lock()), type(threading.RLock())\nlocks = [value for module in (threading, logging, random) for value in vars(module).values() if isinstance(value, kinds)]\nassert len(locks) > 1\nfor lock in locks: lock.acquire(False)\nos._exit(0)"),
    ended(Verdict.EXCEPTION, "break the main module", "import sys\nsys.modules['__main__'].__dict__.clear()\nsys.exit()", "NameError: name 'sys' is not defined"),
)  # fmt: skip

CLOCKS = (
    killed("set the clock", "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)"),
    ended(Verdict.TIMEOUT, "make time stand still", "import time\ntime.time = time.monotonic = time.perf_counter = time.process_time = lambda: 0\nwhile time.time() < 1: pass", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "hide its CPU time in short sleeps", "import time\nwhile True:\n    time.sleep(0.0001)\n    sum(range(20000))", cpu_s=0.2, wall_s=20.0),
    ended(Verdict.TIMEOUT, "hide its CPU time in the kernel", "import os\nwhile True: os.pread(0, 1 << 20, 0)", cpu_s=0.2),
    ended(Verdict.TIMEOUT, "hide its CPU time in threads that end", "import threading\nwhile True:\n    thread = threading.Thread(target=sum, args=[range(10**5)])\n    thread.start()\n    thread.join()", cpu_s=0.2),
    refused("make a clock of its own", "import time\nprint('REACHED', time.clock_gettime(9999))", "[Errno 22] "),
)  # fmt: skip

# The compiler runs before there is a test, in the process that watches the tests.
COMPILING = (
    *(
        ended(Verdict.SYNTAX_ERROR, tries, program, error)
        for tries, program, error in (
            ("compile a NUL", "print(1)\0", "source code string cannot contain null bytes"),
            ("compile a lone surrogate", "x = '\udc80'", "SyntaxError: (unicode error)"),
            ("name an encoding that is none", "# coding: reached\nprint(1)", "SyntaxError: unknown encoding: reached"),
            ("name an encoding that is no text", "# coding: zip\nprint(1)", "is not a text encoding"),
            ("name an encoding that is a path", "# coding: ../../tmp/reached\nprint(1)", "SyntaxError"),
            ("decode to surrogates", "# coding: raw_unicode_escape\nx = '\\udc80'", "surrogates not allowed"),
            ("nest parentheses", "(" * 300, "SyntaxError: too many nested parentheses"),
            ("nest blocks", "".join(" " * depth + "if 1:\n" for depth in range(200)), "too many levels of indentation"),
            ("nest loops", "".join(" " * depth + "for _ in ():\n" for depth in range(30)) + " " * 30 + "pass", "too many statically nested blocks"),
            ("write an endless string", "'''x\n" * 9999, "unterminated triple-quoted string literal"),
            ("write a huge number", "x = " + "9" * 5000, "Exceeds the limit (4300"),
            ("return from nowhere", "return", "SyntaxError: 'return' outside function"),
        )
    ),
    ended(Verdict.EXCEPTION, "exhaust the compiler's recursion", "x" + ".x" * 10**5, "RecursionError"),
    ended(Verdict.TIMEOUT, "compile for ever", "".join(f"x = {number * (2**61 - 1)}\n" for number in range(2 * 10**4)), cpu_s=0.2),  # constants of one hash
    futile("fill the log with warnings", "1 is 1\n" * 10**4),
    futile("carry a byte order mark", "\ufeffprint(1)", "1\n"),
    futile("fold huge constants", "x = lambda: (10**10**5, 'x' * 10**9, (0,) * 10**9, 1 << 10**10)"),
)  # fmt: skip

THEMES = {
    "network": NETWORK,
    "starting": STARTING,
    "signals": SIGNALS,
    "others": OTHERS,
    "kernel": KERNEL,
    "rights": RIGHTS,
    "sharing": SHARING,
    "reading": READING,
    "writing": WRITING,
    "using_up": USING_UP,
    "ending": ENDING,
    "poisoning": POISONING,
    "clocks": CLOCKS,
    "compiling": COMPILING,
}

CATALOGUE = {f"{theme}-{threat.name}": threat for theme, threats in THEMES.items() for threat in threats}
