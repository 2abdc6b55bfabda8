"""Stopping a command by a signal, and child processes that end with their parent.

Every file is complete or absent, so a command may end at any time. SIGINT (Ctrl-C) and SIGTERM raise `Interrupted`; the
command then prints one line and exits with code 128 + signal. A second signal, more than a second later, ends the
process at once. During imports the first signal ends it at once, because C libraries would change the exception, and no
work has begun.
"""

import importlib
import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = "stopped; the same command continues"


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def exit_code(error: KeyboardInterrupt) -> int:
    return error.code if isinstance(error, Interrupted) else 128 + signal.SIGINT


def launch(module: str) -> int:
    """Import `module`, call its main(), handle signals meanwhile; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, _Stop())
    try:
        return int(importlib.import_module(module).main())
    except KeyboardInterrupt as error:
        print(STOPPED, file=sys.stderr)
        return exit_code(error)
    finally:
        for number in SIGNALS:  # a second signal must not change the exit code while Python ends
            signal.signal(number, signal.SIG_IGN)


class _Stop:
    """Signal handler: the first signal raises `Interrupted`; a later one, or one during imports, ends the process."""

    asked: float | None = None  # when the first of all signals came

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _Stop.asked is not None and now < _Stop.asked + 1:
            return  # a key pressed twice; the command is ending already
        if _Stop.asked is not None or _importing(frame):
            cursor = b"\x1b[?25h" if os.isatty(2) else b""  # progress bars hide it
            os.write(2, cursor + f"{STOPPED}\n".encode())
            os._exit(128 + number)
        _Stop.asked = now
        raise Interrupted(number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def end_with(parent: int) -> None:
    """Watch in a thread, and send this process SIGTERM when its parent is no longer the process `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        while True:  # the second signal ends the process at once, if the first is lost or the clean-up hangs
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    threading.Thread(target=watch, daemon=True).start()
