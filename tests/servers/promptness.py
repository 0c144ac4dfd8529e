"""How soon a process ends that was told to: what a machine that is busy with others is allowed."""

import signal
import subprocess
import time

# A second is promised, and one slow test holds the commands to it. Who misses a wish to stop goes
# on for what it waits for, 6 s at the least; a machine that stood still for a moment does not.
STOP_SECONDS = 5.0


def seconds_until_end(
    process: "subprocess.Popen[bytes] | subprocess.Popen[str]", number: signal.Signals
) -> float:
    """Send a signal and return the seconds from then until the process has ended.

    Its output must fit into the pipes, or be of no interest: nobody reads it meanwhile.

    Raises:
        subprocess.TimeoutExpired: It went on for a minute.
    """
    signalled = time.monotonic()
    process.send_signal(number)
    process.wait(60)
    return time.monotonic() - signalled
