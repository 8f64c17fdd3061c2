"""What confirm pictures have answered: one line a look, in `confirm.jsonl` beside each checkpoint.

A checkpoint is known by its weights, so that another file of the same weights in that folder is the
same. Copies of a folder, and lines that were deleted, are not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from superclip.errors import UserError

if TYPE_CHECKING:
    from superclip.model.weights import Checkpoint

LEDGER = "confirm.jsonl"
SCHEMA = 2


@dataclass(frozen=True)
class Look:
    """One answer of one model.

    Attributes:
        question: what was asked. of: the heads, rates or questions that it came to.
        file_sha256: of the claim. decision: what it came to. exploratory: whether it said so.
        weights: sha256 of the model's. result: of the file that holds the answer.
    """

    question: Mapping[str, Any]
    of: str
    file_sha256: str
    decision: str
    exploratory: bool
    weights: str
    result: str

    def same(self, question: Mapping[str, Any], of: str | None) -> bool:
        """Whether it answered this question, by the words of the file or by what they came to."""
        if self.question == question:
            return True
        alike = all(self.question[k] == question[k] for k in ("measure", "attention"))
        return alike and of is not None and self.of == of


def looks(checkpoints: Sequence[Checkpoint]) -> list[Look]:
    """All that these models have answered.

    Raises:
        UserError: if a ledger can't be read.
    """
    mine = {c.weights_sha256 for c in checkpoints}
    folders = dict.fromkeys(c.path.parent for c in checkpoints)
    return [look for f in folders for look in _read(f / LEDGER) if look.weights in mine]


def _read(path: Path) -> Iterator[Look]:
    if not path.exists():
        return
    try:
        for line in path.read_text().splitlines():
            held = json.loads(line)
            if held.pop("schema", 1) != SCHEMA:
                raise ValueError("written by another version")
            yield Look(**held)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read ({error}); it tells what was looked at before, so mend it"
        ) from None


def record(path: Path, report: Mapping[str, Any], checkpoints: Sequence[Checkpoint]) -> None:
    """Write down whatever of a result is not in the ledgers yet."""
    digest, held = result_sha256(path), looks(checkpoints)
    for one, of in zip(checkpoints, report["told"], strict=True):
        look = Look(
            report["question"],
            of,
            report["asked"]["file_sha256"],
            report["decision"],
            report["exploratory"],
            one.weights_sha256,
            digest,
        )
        if look not in held:
            with (one.path.parent / LEDGER).open("a") as file:
                file.write(json.dumps({"schema": SCHEMA, **asdict(look)}, sort_keys=True) + "\n")


def result_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
