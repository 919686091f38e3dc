"""Run a script as Python would, and print the peak of its resident memory in bytes, as the last line of the output.

python bench/peak_memory.py data.py text.txt
"""

import os
import resource
import runpy
import sys
from pathlib import Path


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, since the program was started.

    Linux keeps ru_maxrss across fork and exec: a small child of a large parent would report its parent's peak. VmHWM
    begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(peak_memory())
