"""The one exception a user's mistake becomes, and how a command prints it."""

import io
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """A mistake the user can mend. The message names the flag, the value and the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'clip'?"` for the closest of the known names, or the list of all of them.

    >>> nearest("clp", ["clip", "superclip"])
    "did you mean 'clip'? (known: clip, superclip)"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
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


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; nothing half written stays where the disk is full."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command; a `UserError` becomes one line on stderr and exit status 2, no traceback.

    Ctrl-C ends with one line too, and the usual status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class name in a script the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
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
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "interrupted; the same command starts again, or goes on where it saved", file=sys.stderr
        )
        raise SystemExit(130) from None
