"""The one exception a user's mistake becomes, and how a command prints it."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO, cast


class UserError(ValueError):
    """A mistake the user can mend. The message names the flag, the value and the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'clip'?"` for the closest of the known names, or the list of all of them.

    >>> nearest("clp", ["clip", "superclip"])
    "did you mean 'clip'? (known: clip, superclip)"
    """
    names = sorted(known)
    close = [known for known in names if known.casefold() == name.casefold()]
    close += get_close_matches(name, names, n=1)
    listed = ", ".join(names) if len(names) <= 12 else ", ".join(names[:12]) + ", ..."
    return (f"did you mean {close[0]!r}? " if close else "") + f"(known: {listed})"


def check_writable(path: Path, flag: str) -> None:
    """Refuse an output path before the work rather than after it.

    Raises:
        UserError: if the path lies below a file, or in a folder that can't be written.
    """
    parent = path
    while not parent.exists():
        parent = parent.parent
    if parent != path and not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is a file; name another place")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: {parent} can't be written; name another place")


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint's name at once, before torch is imported.

    Raises:
        UserError: if no file stands there.
    """
    if path.is_dir():
        held = path / "final_epoch.pt"
        example = held if held.is_file() else held.name
        raise UserError(f"{path} is no file; name a checkpoint, as {example}")
    if not path.exists():
        quoted = "; leave a pattern unquoted" if set(path.name) & set("*?[") else ""
        raise UserError(f"{path} does not exist{quoted}")
    if not path.is_file():
        raise UserError(f"{path} is no file; name a checkpoint, as final_epoch.pt")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to that takes the place of `path` whole, or not at all; nothing half written
    stays where the disk is full."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


class _Steady:
    """Standard output that never ends the work: once it can't be written (a closed pipe, a full
    disk) the rest is dropped, while what was measured still reaches its file."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        return self._try(lambda: self.stream.write(text), flush="\n" in text) or len(text)

    def flush(self) -> None:
        self._try(lambda: None, flush=True)

    def _try(self, act: Callable[[], int | None], flush: bool) -> int | None:
        try:
            done = act()
            if flush:
                self.stream.flush()
            return done
        except OSError as error:
            self.lost = error
            # What the stream still holds must go somewhere when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def told_of(name: str) -> Iterator[None]:
    """A `UserError` within says what it is of."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{name}: {error}" if name else str(error)) from None


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command; a `UserError` becomes one line on stderr and exit status 2, no traceback.

    Ctrl-C ends with one line too, and the usual status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class name in a script the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    sys.stdout = steady = cast(Any, _Steady(sys.stdout))
    try:
        main(sys.argv[1:])
        if steady.lost is not None and not isinstance(steady.lost, BrokenPipeError):
            raise UserError(f"standard output: {steady.lost.strerror}; the files are written")
    except UserError as error:
        # A reader process wraps the message in its traceback; the message is its last line.
        line = str(error).strip().splitlines()[-1].removeprefix(f"{__name__}.UserError: ")
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # what torch raises for a killed reader
            raise
        print(f"error: {error}; the memory may be full: use fewer --workers", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "interrupted; the same command starts again, or goes on where it saved", file=sys.stderr
        )
        raise SystemExit(130) from None
