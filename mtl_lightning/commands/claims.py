"""One run, one process: what keeps two processes on the same folder apart."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ClaimedError(Exception):
    """Another process has the claim."""


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold the claim on what ``path`` stands for while the context is open.

    The claim is a lock of the operating system (``flock``) on the file ``path``, which says who holds it. It ends with
    the process, however that ends, so that no claim is ever stale and none has to be cleared by hand; the file remains,
    and means nothing without the lock. On network file systems locks hold for all machines if the file system has them
    (NFS and Lustre, the latter mounted with ``flock``). Where there are none, and on Windows, a line on stderr says
    that nothing keeps two processes apart.

    Args:
        path: The lock file; its folder is made.

    Raises:
        ClaimedError: If another process has the claim; the message says which.

    Example:
        >>> import tempfile
        >>> with claim(Path(tempfile.mkdtemp(), "run.lock")):
        ...     print("mine")
        mine
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ClaimedError(f"in work elsewhere: {_holder(file.read())}") from None
        except (ImportError, OSError) as error:
            sys.stderr.write(f"mtl-lightning: no locks for {path} ({error}): run no second process on this folder\n")
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        return "process {pid} on {host}".format(**json.loads(text))
    except (ValueError, KeyError, TypeError):  # it is just being written
        return "another process"
