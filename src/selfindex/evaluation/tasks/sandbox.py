"""Running a model's program in a process of its own, with limits.

The limits are there for accidents: endless loops, huge lists, files, processes and connections that a
reply has no use for. They do not hold back a program that is written to get around them.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 5
MEMORY = 1 << 29
"""Bytes of address space beyond what the interpreter has at its start."""

# Imports read folders and files, and nothing else is needed. `-I` keeps the environment out.
_RUNNER = """
import resource, sys
seconds, memory, passed, program = sys.argv[1:]
with open("/proc/self/statm") if sys.platform == "linux" else open("/dev/null") as file:
    used = int((file.read() or "0").split()[0]) * resource.getpagesize()
for kind, most in (("CPU", int(seconds)), ("FSIZE", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
if used:
    resource.setrlimit(resource.RLIMIT_AS, (used + int(memory),) * 2)
harmless = ("os.listdir", "os.scandir")
refused = ("os", "socket", "subprocess", "shutil", "ctypes", "pty")
def refuse(event, given):
    writes = event == "open" and (given[1] or "r") not in ("r", "rb")
    room = event.partition(".")[0]
    if writes or (room in refused and event not in harmless):
        raise PermissionError(event)
said, sys.stdout = sys.stdout, open("/dev/null", "w")
sys.addaudithook(refuse)
exec(compile(program, "reply", "exec"), {"__name__": "reply"})
said.write(passed)
"""


def passes(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a program runs to its end, in a new Python process of its own session.

    Args:
        seconds: of processor time, and twice as many in all.
        memory: bytes it may allocate.
    """
    passed = secrets.token_hex(16)  # an early exit is no success
    command = [sys.executable, "-I", "-c", _RUNNER, str(seconds), str(memory), passed, program]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return False
    return said == passed
