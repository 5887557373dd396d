"""What differs between operating systems: signals, file locks, the memory of a process, syncing of directories."""

import errno
import os
import signal
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# the signals that ask a run to stop; Windows has no SIGUSR1
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


def lock_file(descriptor: int) -> None:
    """Lock an open file for this process alone, until it is closed. Raises OSError if another process holds the lock.

    It is a POSIX record lock. The flock of the package filelock would be shared by forked data loader workers, and
    survive with them. A system without such locks raises OSError with ENOSYS, as a file system without locks may.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def peak_resident() -> int | None:
    """The largest resident set that this process had, in bytes; None on a system that does not count it."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes


def sync_directory(path: Path) -> None:
    """Write the entries of a directory to disk, after files were created or renamed in it.

    Windows opens no directories; its file system keeps a journal of renames.
    """
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def allow_cpu_operators() -> None:
    """Let torch compute on the CPU what Apple's GPUs have no operator for; torch warns of each such operator.

    Must act before torch is imported.
    """
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
