"""Picture files of a folder as a `Source`, for lists that name their pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from superclip.data.batch import Record
from superclip.data.geometry import BadPicture, picture_size
from superclip.data.patience import Patience


class PictureFiles:
    """Named files below a folder; rows follow the names. There are no captions.

    Args:
        root: the folder.
        names: paths relative to it, without repeats; they are the keys.

    Attributes:
        digest: over the names and sizes (bytes) of the files; they are not read for it.

    Raises:
        OSError: if a file is absent.
    """

    def __init__(self, root: Path, names: Sequence[str]):
        assert len(set(names)) == len(names), "repeated names"
        self.root, self.keys, self.name = root, list(names), root.name
        self._patience = Patience()
        sizes = [(root / name).stat().st_size for name in self.keys]
        self.digest = hashlib.sha256(json.dumps([self.keys, sizes]).encode()).hexdigest()
        self.num_images, self.num_captions = len(self.keys), 0
        self.shard_sizes = (self.num_images,)

    def read(self, row: int) -> Record:
        """One picture.

        Raises:
            BadPicture: if its file cannot be read or has no readable header.
        """
        path = self.root / self.keys[row]
        try:
            picture = self._patience(path, path.read_bytes)
        except OSError as error:
            raise BadPicture(f"{path}: {error.strerror}") from error
        width, height = picture_size(picture)
        return Record(row, self.keys[row], width, height, picture, (), ())

    def where(self, row: int) -> str:
        return str(self.root / self.keys[row])
