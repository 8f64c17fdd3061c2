"""Streams give true pairs, split over ranks and readers, and say what is broken."""

import functools
import io
import json
import shutil
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data.photos import PREPROCESS, assert_true_to_ids, jpeg, tokenize

from superclip.data.batch import Batch
from superclip.data.loader import PairMaker
from superclip.data.shards import is_stream
from superclip.data.sources import open_source
from superclip.data.stream import Stream, stream_batches
from superclip.errors import UserError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def samples(first, last):
    """Pictures whose caption comes from KEY.txt or from KEY.json."""
    members = {}
    for row in range(first, last):
        caption = f"picture {row}"
        members[f"{row:04d}.jpg"] = jpeg(row)
        if row % 2:
            members[f"{row:04d}.txt"] = caption.encode()
        else:
            members[f"{row:04d}.json"] = json.dumps({"caption": caption}).encode()
    return members


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("stream")
    for number in range(4):
        write_tar(out / f"{number:02d}.tar", samples(20 * number, 20 * number + 20))
    return out


def batches(spec, workers=0, rank=0, ranks=1, start=0, total=6, rows=10):
    return stream_batches(
        Stream(spec, 60),
        PairMaker(PREPROCESS, tokenize, (1.0, 1.0)),
        *(0, rows, rank, ranks, start, total, workers, False, 60.0),
    )


ROW_OF = {tokenize(f"picture {row}").tobytes(): row for row in range(200)}


def rows_in(found):
    return [ROW_OF[t.numpy().tobytes()] for batch, _ in found for t in batch.tokens]


def assert_true(found):
    for batch, _ in found:
        rows = [ROW_OF[t.numpy().tobytes()] for t in batch.tokens]
        ids = batch.image_ids.new_tensor(rows)
        assert_true_to_ids(Batch(batch.images, batch.tokens, ids, ids))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pipe_gives_true_pairs_and_running_numbers(folder, workers):
    found = list(batches(f"pipe:cat {folder}/{{00..03}}.tar", workers))
    assert_true(found)
    assert len(found) == 6 and not sum((c for _, c in found), Counter())
    for name in ("image_ids", "caption_ids"):
        assert [i for b, _ in found for i in getattr(b, name).tolist()] == list(range(60))
    assert len(set(rows_in(found)) & set(range(80))) > 30


def test_http_gives_true_pairs(folder):
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens http with curl, which is not here")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    handler = functools.partial(quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = list(batches(f"{url}/{{00..03}}.tar"))
        assert_true(found)
        assert not sum((c for _, c in found), Counter())
        half = list(batches(f"{url}/00.tar::{url}/none.tar"))
        assert sum((c for _, c in half), Counter()).total() > 0 and set(rows_in(half)) < {
            *range(20)
        }
        with pytest.raises(
            UserError, match=r"\d+ samples or shards of 'http.*in a row can't be read"
        ):
            next(batches(f"{url}/none.tar"))
        server.shutdown()


def test_ranks_readers_and_starts_draw_differently_and_again_alike(folder):
    spec = f"pipe:cat {folder}/{{00..03}}.tar"
    ways = {
        (rank, start, workers): list(batches(spec, workers, rank, 2, start))
        for rank, start, workers in ((0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 2))
    }
    assert len({tuple(rows_in(found)[:30]) for found in ways.values()}) == 4
    assert rows_in(batches(spec, 2, 0, 2)) == rows_in(ways[0, 0, 2])
    assert [b.image_ids[0].item() for b, _ in ways[1, 0, 0]] == [10, 30, 50, 70, 90, 110]
    assert [b.image_ids[0].item() for b, _ in ways[0, 3, 0]] == [60, 80, 100]


def test_what_is_broken_is_left_out_and_counted(tmp_path):
    good = samples(0, 20)
    broken = {
        "a.jpg": b"junk",
        "a.txt": b"x",
        "b.txt": b"no picture",
        "c.jpg": jpeg(0),
        "d.jpg": jpeg(0),
        "d.json": b"{",
    }
    write_tar(tmp_path / "0.tar", good | broken)
    found = list(batches(f"pipe:cat {tmp_path}/0.tar", rows=20))
    assert_true(found)
    causes = sum((c for _, c in found), Counter())
    assert set(causes) == {"UnidentifiedImageError", "BrokenFacts"}
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: whole.index(jpeg(8)) + 50])
    found = list(batches(f"pipe:cat {tmp_path}/1.tar"))
    assert_true(found)
    assert "ReadError" in sum((c for _, c in found), Counter())


@pytest.mark.parametrize(
    "command",
    ["cat {}/none.tar 2>&-", "true", "head -c 10240 /dev/zero", "cat {}/x.tar"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_a_good_sample_stops(tmp_path, command, workers):
    write_tar(tmp_path / "x.tar", {f"{row}.jpg": jpeg(0) for row in range(9)})
    with pytest.raises(
        UserError, match=r"\d+ .* of 'pipe:.*' in a row can't be read, the last for"
    ):
        next(batches(f"pipe:{command.format(tmp_path)}", workers))


def test_streams_are_known_and_need_a_length():
    assert is_stream("pipe:cat x.tar") and is_stream("x.tar::http://a/b.tar")
    assert not is_stream("scenes::coco:folder") and not is_stream("x-{00..03}.tar")
    with pytest.raises(UserError, match="unknown length; say with --train-num-samples"):
        Stream("pipe:cat x.tar", None)
    with pytest.raises(UserError, match="unbalanced braces"):
        Stream("pipe:cat {a", 5)
    with pytest.raises(UserError, match="is a stream, which can only be trained on"):
        open_source("pipe:cat x.tar")
    assert Stream("http://a/{0..2}.tar", 5).digest != Stream("http://a/{0..3}.tar", 5).digest


def test_a_stream_that_hangs_is_named():
    found = stream_batches(
        Stream("pipe:sleep 9", 60),
        PairMaker(PREPROCESS, tokenize, (1.0, 1.0)),
        *(0, 10, 0, 1, 0, 6, 1, False, 2.0),
    )
    with pytest.raises(UserError, match=r"^reader 0 has been reading pipe:sleep 9 for \d+ s"):
        next(found)
