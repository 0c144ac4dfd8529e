"""Manifests are decoded by several threads at once, of which none has to be the first."""

import subprocess
import sys

from tests.servers.hooks import CALL_SECONDS

MANY_THREADS = """
import sys, threading
import msgspec
from agent_plugin.content.lone_surrogates import LoneSurrogateReader
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(8)
def work():
    for shape in shapes:
        barrier.wait()
        LoneSurrogateReader(b'{"files": [{"size": 1}]}').decode(shape)
def shape(number):
    fields = [("size", int)] + [(f"f{i}", int, 0) for i in range(9)]
    file = msgspec.defstruct(f"File{number}", fields)
    return msgspec.defstruct(f"Shape{number}", [("files", list[file])])
shapes = [shape(number) for number in range(100)]
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("all")
"""


def test_threads_that_are_the_first_to_decode_a_shape_do_not_crash_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY_THREADS],
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr
