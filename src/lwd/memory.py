"""How the process holds its memory."""

from __future__ import annotations

import ctypes
import sys

# Names and values of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next request, until the process ends. Returns whether it could.

    A step on a CPU frees and requests the same hundreds of megabytes; glibc gives large pieces back to the system each
    time, and every page costs a fault when it comes again (`docs/results/speed.md`). The commands of `lwd` call this; a
    program that trains or samples on a CPU may. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
