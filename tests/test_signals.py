"""Signals: a command that was stopped, but waits at its end, is ended by a second signal."""

import signal
import subprocess
import sys
import time

WAITS = """
import sys, threading, time
from posttrain.core.signals import launch
sys.modules["waits"] = sys.modules["__main__"]
def main():
    threading.Thread(target=time.sleep, args=(60,)).start()  # Python waits for it at its end
    print("begun", flush=True)
    time.sleep(60)
sys.exit(launch("waits"))
"""


def test_a_second_signal_ends_a_process_that_waits_for_a_thread() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)  # within a second it would count as the first
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "stopped; the same command continues\n" * 2
