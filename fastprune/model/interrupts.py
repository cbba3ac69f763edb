"""Ctrl-C, put off while something is half done.

An interrupt may come between any two instructions. Where state is changed or put back in several steps, it has to come
before or after them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the end of the context; its handler runs then, whether there was an exception or not.

    For work of moments. Only the main thread is ever interrupted, so in others there is nothing to do; nor is there
    under a handler that Python did not install.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    came: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
