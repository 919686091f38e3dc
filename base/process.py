"""What the operating system says of this process."""

import math
import sys
from pathlib import Path


def peak_resident_memory() -> float:
    """Peak resident memory of this process in bytes, since the program was started; nan where nothing tells it.

    Linux keeps ru_maxrss across fork and exec: a small child of a large parent would report its parent's peak. VmHWM
    begins anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    if sys.platform == "darwin":
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes here
    return math.nan
