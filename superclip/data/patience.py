"""Reading where the file system fails for a while, hangs, or takes a reader down with it."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import TypeVar

from superclip.errors import UserError

WAITS = (0.1, 0.4, 1.6)
"""Seconds between the tries to read from a file system that fails."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class Patience:
    """Tries again where the file system fails, with one warning a file.

    A file whose last try failed gets a single one, without waiting, until it can be read again:
    a thousand pictures in a lost shard must not cost a thousand waits.
    """

    def __init__(self, waits: tuple[float, ...] = WAITS):
        self.waits = waits
        self._warned: set[Path] = set()
        self._lost: set[Path] = set()

    def __call__(self, path: Path, read: Callable[[], T]) -> T:
        """What `read` returns; it must open `path` anew after a failure.

        Raises:
            OSError: of the last try.
        """
        for wait in () if path in self._lost else self.waits:
            try:
                return read()
            except OSError as error:
                if path not in self._warned:
                    log.warning("%s: %s; trying again", path, error.strerror or error)
                self._warned.add(path)
            time.sleep(wait)
        self._lost.add(path)
        result = read()
        self._lost.remove(path)
        return result


class Watch:
    """Knows what every reader is reading, and ends the run where one hangs or dies.

    Args:
        readers: reader processes; with 0 the training process reads.
        timeout: seconds without a batch after which the run ends.
        name: the number that a reader notes -> what it reads, and from where.
    """

    def __init__(self, readers: int, timeout: float, name: Callable[[int], str]):
        self.readers, self.timeout, self.name = readers, timeout, name
        self._board = RawArray("q", [-1, 0, 0] * max(readers, 1))  # number, since when, process
        self._asked = math.inf

    def note(self, number: int) -> None:
        """Called in a reader: it begins to read `number`; -1 is a pause."""
        self._board[3 * _reader : 3 * _reader + 3] = [number, time.monotonic_ns(), os.getpid()]

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches, as long as they come in time.

        Raises:
            UserError: naming reader and file, if none comes or a reader dies. Where the training
                process reads and hangs, it prints that line and exits with status 2.
        """
        done = threading.Event()
        if not self.readers:
            threading.Thread(target=self._guard, args=(done,), daemon=True).start()
        try:
            while (batch := self._next(batches)) is not None:
                yield batch
        except UserError as error:
            traceback.clear_frames(error.__traceback__)
            del batches  # ends the readers now, not when the traceback is forgotten
            raise
        finally:
            done.set()

    def _next(self, batches: Iterator[T]) -> T | None:
        self._asked = time.monotonic()
        try:
            return next(batches, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):
                raise
            verdict = self._verdict(str(error))
        finally:
            self._asked = math.inf
        raise UserError(verdict)  # outside, so that it holds no traceback that holds the readers

    def _guard(self, done: threading.Event) -> None:
        while not done.wait(self.timeout / 20):
            if time.monotonic() > self._asked + self.timeout:
                self._give_up()
                return

    def _give_up(self) -> None:
        print(f"error: {self._verdict('timed out')}", file=sys.stderr, flush=True)
        os._exit(2)  # the hanging thread can't be interrupted

    def _verdict(self, error: str) -> str:
        """Whom to blame: the reader that died, else the one that has read longest."""
        board = list(zip(*[iter(self._board)] * 3))
        dead = re.search(r"pid\D*(\d+)", error)
        at_work = [reader for reader, (number, _, _) in enumerate(board) if number >= 0]
        if dead:
            at_work = [r for r in at_work if board[r][2] == int(dead[1])]
        if not at_work:
            return f"no batch within {self.timeout:g} s, and no reader at work ({error.strip()})"
        reader = min(at_work, key=lambda r: board[r][1])
        number, since, _ = board[reader]
        who = f"reader {reader}" if self.readers else "the training process"
        if dead:
            return (
                f"{who} died while reading {self.name(number)} ({error.strip()}); most often the "
                "memory was full: start again with fewer --workers"
            )
        return (
            f"{who} has been reading {self.name(number)} for "
            f"{(time.monotonic_ns() - since) / 1e9:.0f} s; see what keeps that file, or raise "
            f"--reader-timeout {self.timeout:g}"
        )


_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
_reader = 0
"""Which reader this process is."""


def start_readers(loader: Iterable[T]) -> Iterator[T]:
    """The loader's iterator, its readers deaf from birth to signals for the training process.

    A cluster sends SIGTERM or SIGUSR1 to every process of a job. The training process answers by
    finishing its step, for which it needs its readers; so they obey nobody but it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_reader(reader: int) -> None:
    """Set up a reader process: one thread, and one more that waits for the order to end."""
    import torch

    global _reader
    _reader = reader
    torch.set_num_threads(1)
    parent = os.getppid()

    def listen() -> None:
        while True:
            sent = signal.sigwaitinfo(_SIGNALS)
            if sent.si_signo == signal.SIGTERM and sent.si_pid == parent:
                os._exit(0)  # also out of a read that hangs

    threading.Thread(target=listen, daemon=True).start()
