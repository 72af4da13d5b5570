"""A process that has imported everything and forks a child for each run it is asked for.

Killing a run two hundred times must not cost two hundred imports of torch. Reads one JSON request
a line from standard input, answers with one JSON line a message:

    {"do": "run" | "resume", "config": PATH, "folder": PATH, "crash_at": N | null, "changed": [...]}
    -> {"pid": N}, then {"status": wait status, "operations": N | null}

With ``crash_at`` the child kills itself before its n-th file operation inside the run folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from dmrl_ray.config.loading import load_config
from dmrl_ray.control import controller
from dmrl_ray.errors import exit_code
from dmrl_ray.results.display import Display

OPERATIONS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.truncate", "os.rmdir"}


def count_operations(folder: str, crash_at: int | None) -> list[int]:
    """Count file operations that change the folder; die before number `crash_at`."""
    count = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in OPERATIONS or not str(arguments[0]).startswith(folder):
            return
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return
        count[0] += 1
        if count[0] == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def play(request: dict[str, object]) -> int:
    """What the child does; returns its exit code."""
    folder = Path(str(request["folder"]))
    display = Display(quiet=True)
    try:
        if request["do"] == "resume":
            controller.resume(folder, overrides=request.get("changed", ()), display=display)
        else:
            controller.run(load_config(Path(str(request["config"]))), folder, display=display)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(read)
            count = count_operations(str(request["folder"]), request.get("crash_at"))
            code = play(request)
            os.write(write, str(count[0]).encode())
            os._exit(code)
        os.close(write)
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitpid(pid, 0)[1]
        told = os.read(read, 32).decode()
        os.close(read)
        message = {"status": status, "operations": int(told) if told else None}
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
