"""Ctrl-C and termination wait for the end of a step."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Inside, the first SIGINT or SIGTERM is only noted; at the exit it is raised again.

    A loop asks ``noted`` between steps, writes its checkpoint and leaves; the process then meets
    the signal as if it had come at that moment. A second signal acts at once. A signal that the
    process ignores (a shell's job in the background ignores SIGINT) stays ignored. Outside the main
    thread nothing is changed (Python delivers no signals there).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.noted: int | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in self.SIGNALS}
            self._before = {n: h for n, h in handlers.items() if h is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if self.noted is not None and kind is None:
            signal.raise_signal(self.noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
