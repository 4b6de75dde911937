"""A real terminal, or a file, in place of stderr. Only inside a test: pytest puts its own in place before."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import tempfile
import threading


class Screen:
    """A terminal (a pty). As a context it takes the place of sys.stderr; `text` is all that was written to it."""

    def __init__(self):
        self._ours, self.theirs = pty.openpty()
        self.text = ""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self.file = os.fdopen(os.dup(self.theirs), "w", buffering=1)

    def _read(self):
        data = b""
        with contextlib.suppress(OSError):  # EIO: the last writer is gone
            while more := os.read(self._ours, 4096):
                data += more
                self.text = data.decode(errors="ignore")

    def __enter__(self):
        self._before, sys.stderr = sys.stderr, self.file
        return self

    def __exit__(self, *error):
        sys.stderr = self._before
        self.close()

    def close(self):
        self.file.close()
        os.close(self.theirs)
        self._thread.join(10)
        os.close(self._ours)


class File:
    """Likewise, a file."""

    def __enter__(self):
        self._before, sys.stderr = sys.stderr, tempfile.TemporaryFile("w+")
        return self

    def __exit__(self, *error):
        sys.stderr, file = self._before, sys.stderr
        file.seek(0)
        self.text = file.read()
        file.close()
