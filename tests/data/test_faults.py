"""What happens when data goes bad while it is read: counted, or stopped with a name, never silent,
never a hang."""

import errno
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter

import pytest
from conftest import ROOT
from data.photos import NO_WAITS, assert_true_to_ids, jpeg, one_pass, pack, photo, training_rows

from superclip.data.loader import SUBSTITUTES, EvalRows
from superclip.data.order import Order, Purpose, draw
from superclip.data.patience import Watch
from superclip.data.shards import Shards
from superclip.errors import UserError

READERS = pytest.mark.parametrize("workers", [0, 2])


def shard(tmp_path, number):
    return tmp_path / f"train-{number:06d}.tar"


@READERS
def test_pictures_of_a_deleted_shard_are_counted_and_replaced(tmp_path, workers):
    source = Shards(pack(tmp_path, 60, 20), NO_WAITS)
    shard(tmp_path, 1).unlink()
    batches = list(one_pass(source, workers))
    causes = sum((c for _, c in batches), Counter())
    ids = [row for batch, _ in batches for row in batch.image_ids.tolist()]
    assert len(ids) == 60 and not set(ids) & set(range(20, 40))
    assert set(causes) == {"FileNotFoundError"} and causes.total() >= 20
    for batch, _ in batches:
        assert_true_to_ids(batch)


def test_a_shard_deleted_while_it_is_open_is_read_on(tmp_path):
    source = Shards(pack(tmp_path, 20, 20), NO_WAITS)
    source.read(3)
    shard(tmp_path, 0).unlink()
    assert not sum((c for _, c in one_pass(source, 0)), Counter())


def cut(path):
    os.truncate(path, 3000)


def overwrite(path):
    """Garbage of the same length, written in place."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(os.urandom(size))


def swap(path):
    """Another good shard under the old name."""
    other = path.parent / "other"
    other.mkdir()
    pack(other, 40, 20)
    shard(other, 1).replace(path)


@READERS
@pytest.mark.parametrize("harm", [cut, overwrite, swap])
def test_a_shard_that_changes_while_a_loader_reads_stops_the_run(tmp_path, workers, harm):
    source, before = (
        Shards(pack(tmp_path, 400, 400), NO_WAITS),
        set(multiprocessing.active_children()),
    )
    message = r"train-000000\.tar has changed since.*start again"
    with pytest.raises(UserError, match=message) as caught:
        if harm is swap:  # open descriptors would show the old shard to the end
            harm(shard(tmp_path, 0))
        for number, (batch, causes) in enumerate(one_pass(source, workers)):
            assert_true_to_ids(batch)
            assert not causes
            if number == 1:
                harm(shard(tmp_path, 0))
    assert set(multiprocessing.active_children()) == before, caught


def test_bytes_gone_bad_behind_an_unchanged_file_are_counted(tmp_path):
    """As on a failing disk: no size and no time tells."""
    source = Shards(pack(tmp_path, 40, 20), NO_WAITS)
    before, index = shard(tmp_path, 0).stat(), source._indices[0]
    harmed = {2: index.facts[2], 5: index.picture[5], 7: index.facts[7]}
    with shard(tmp_path, 0).open("r+b") as file:
        for row, (offset, length) in harmed.items():
            file.seek(offset)
            file.write(b'{"caption": ""}'.ljust(length) if row == 7 else b"x" * length)
    os.utime(shard(tmp_path, 0), ns=(before.st_atime_ns, before.st_mtime_ns))
    rows = training_rows(source)
    found = {row: rows[(0, row, 0)]["causes"][0] for row in harmed}
    assert found == {2: "BrokenFacts", 5: "UnidentifiedImageError", 7: "BrokenFacts"}
    with pytest.raises(UserError, match=r"picture id0002 can't be read: .*id0002: broken facts"):
        EvalRows(source, rows.make.preprocess)[2]


def test_another_list_of_shards_is_other_data(tmp_path):
    pack(tmp_path, 60, 20)
    paths = [str(shard(tmp_path, k)) for k in range(3)]
    lists = (paths, paths[:2], paths[::-1])
    assert len({Shards(",".join(names)).digest for names in lists}) == 3


def bomb() -> bytes:
    """A PNG of 30 000 x 30 000 white pixels, some 110 kB."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    side, packer = 30_000, zlib.compressobj(9)
    row = b"\0" + b"\xff" * (side // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    head = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    parts = chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_picture_bomb_is_refused_before_memory_is_taken_for_it(tmp_path):
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb())
    code = """if True:
        import resource, sys
        from superclip.data.geometry import BadPicture, picture_size, plan, render
        data = open(sys.argv[1], "rb").read()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (picture_size, lambda d: render(d, plan(30_000, 30_000, 224, "squash"), True)):
            try:
                read(data)
            except BadPicture as error:
                print(type(error.__cause__).__name__)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    *causes, kilobytes = done.stdout.split()
    assert causes == ["DecompressionBombError"] * 2, done.stderr
    assert int(kilobytes) < 20_000, "one bit a pixel alone would be 110 000"


def test_a_picture_bomb_among_the_data_is_counted(tmp_path):
    import tarfile
    from io import BytesIO

    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for row in range(20):
            picture = ("png", bomb()) if row == 8 else ("jpg", jpeg(row))
            for name, data in (picture, ("txt", f"picture {row}".encode())):
                entry = tarfile.TarInfo(f"{row:03d}.{name}")
                entry.size = len(data)
                tar.addfile(entry, BytesIO(data))
    batches = list(one_pass(Shards(str(tmp_path / "train-000000.tar")), 0))
    assert sum((c for _, c in batches), Counter()) == {"DecompressionBombError": 1}
    assert 8 not in {row for batch, _ in batches for row in batch.image_ids.tolist()}


def test_200_corrupt_among_2000_are_counted_alike_on_any_ranks_and_workers(tmp_path):
    kinds = (b"junk", b"\xff\xd8" + b"q" * 50, b"\x89PNG\r\n\x1a\n" + b"\xff" * 50)
    rotten = {row: kinds[row % 3] for row in range(3, 2000, 10)}
    assert len(rotten) == 200
    source = Shards(pack(tmp_path, 2000, 250, rotten), NO_WAITS)

    def stand_in(row, tries=0):
        """The picture in the place of `row`, and how many unreadable ones were met on the way."""
        place, chosen = row * (SUBSTITUTES + 1), row
        while chosen in rotten:
            rng = draw(0, 0, place + tries, Purpose.SUBSTITUTE)
            chosen, tries = int(rng.integers(2000)), tries + 1
        return chosen, tries

    rows, _ = Order(source.shard_sizes, 0).rows(0, 0, 2000)
    expected = [stand_in(row) for row in rows.tolist()]
    for ranks, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
        parts = [list(one_pass(source, workers, 100 // ranks, r, ranks)) for r in range(ranks)]
        ids = [i for step in zip(*parts) for batch, _ in step for i in batch.image_ids.tolist()]
        causes = sum((c for part in parts for _, c in part), Counter())
        assert ids == [chosen for chosen, _ in expected]
        assert causes.total() == sum(tries for _, tries in expected) >= 200
    for batch, _ in parts[0]:
        assert_true_to_ids(batch)


class Flaky(Shards):
    """Shards on a file system that fails to open each of them `faults` times."""

    def __init__(self, pattern, waits, faults):
        super().__init__(pattern, waits)
        self.faults, self.opened = Counter(dict.fromkeys(range(9), faults)), 0

    def _descriptor(self, shard):
        self.opened += 1
        self.faults[shard] -= 1
        if self.faults[shard] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return super()._descriptor(shard)


def test_a_flaky_file_system_is_asked_again_with_one_warning_a_shard(tmp_path, caplog):
    source = Flaky(pack(tmp_path, 40, 20), NO_WAITS, 2)
    with caplog.at_level(logging.WARNING):
        batches = list(one_pass(source, 0))
    assert not sum((c for _, c in batches), Counter())
    assert len(caplog.records) == 2
    assert re.search(r"train-00000[01]\.tar: Input/output error; trying again", caplog.text)


def test_a_lost_shard_is_waited_for_once_not_for_every_picture(tmp_path):
    source = Flaky(pack(tmp_path, 20, 20), NO_WAITS, 8)
    for row in range(6):
        with pytest.raises(OSError, match="Input/output"):
            source.read(row)
    assert source.opened == len(NO_WAITS) + 1 + 5
    assert source.read(6).key == "id0006", "it came back"
    os.close(source._open.pop(0))
    source.faults[0] = 2
    assert source.read(7).key == "id0007", "and is waited for again"


def test_a_stale_descriptor_is_opened_anew(tmp_path):
    """As NFS answers reads of a file that its server has lost sight of."""
    source = Shards(pack(tmp_path, 20, 20), NO_WAITS)
    source.read(0)
    unreadable = os.open(tmp_path, os.O_RDONLY)
    os.dup2(unreadable, source._open[0])
    os.close(unreadable)
    assert source.read(1).picture == photo(1).picture


def test_a_shard_that_comes_back_in_time_is_read(tmp_path):
    source = Shards(pack(tmp_path, 20, 20))
    away = shard(tmp_path, 0).rename(tmp_path / "away")
    back = threading.Timer(0.2, away.rename, [shard(tmp_path, 0)])
    back.start()
    assert source.read(4).picture == photo(4).picture
    back.join()


def hanging(tmp_path) -> Shards:
    """Two shards, the second of which hangs when it is opened."""
    source = Shards(pack(tmp_path, 40, 20), NO_WAITS)
    shard(tmp_path, 1).unlink()
    os.mkfifo(shard(tmp_path, 1))
    return source


NAMED = r"has been reading id00[23]\d of .*train-000001\.tar for \d+ s; .*--reader-timeout"


def test_a_hanging_reader_is_named_and_ended(tmp_path):
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError, match=rf"^reader 0 {NAMED} 3$") as caught:
        list(one_pass(hanging(tmp_path), 1, timeout=3.0))
    assert set(multiprocessing.active_children()) == before, caught


def test_a_training_process_that_hangs_in_a_read_names_the_file_and_ends(tmp_path):
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from pathlib import Path
        from data.photos import one_pass
        from data.test_faults import hanging
        list(one_pass(hanging(Path({str(tmp_path)!r})), 0, timeout=1.0))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 2
    assert re.match(rf"error: the training process {NAMED} 1\n$", done.stderr), done.stderr


def test_a_reader_that_is_killed_is_named(tmp_path):
    batches = one_pass(hanging(tmp_path), 1)
    (reader,) = multiprocessing.active_children()
    threading.Timer(1.5, reader.kill).start()
    with pytest.raises(UserError, match=r"^reader 0 died while reading id00.* of .*0001\.tar"):
        list(batches)


def test_readers_obey_the_training_process_alone(tmp_path):
    """SLURM signals every process of a job; the step that is to be finished needs its readers."""
    batches = one_pass(Shards(pack(tmp_path, 200, 100), NO_WAITS), 2)
    first = next(batches)
    readers = multiprocessing.active_children()
    for name in ("-TERM", "-USR1"):
        subprocess.run(["kill", name, *(str(r.pid) for r in readers)], check=True)
    time.sleep(0.2)
    assert len([first, *batches]) == 20


def test_a_hanging_reader_ends_when_it_is_told_to(tmp_path):
    batches = one_pass(hanging(tmp_path), 1)
    (reader,) = multiprocessing.active_children()
    time.sleep(1)  # until it hangs
    reader.terminate()
    reader.join(10)
    assert reader.exitcode == 0
    del batches


class Recorded(Watch):
    fired = False

    def _give_up(self):
        self.fired = True


def test_a_slow_training_step_is_not_taken_for_a_hanging_read():
    watch = Recorded(0, 0.1, str)
    for _ in watch.over(iter([1, 2])):
        time.sleep(0.3)
    assert not watch.fired
    assert list(watch.over(time.sleep(0.3) or n for n in (1,))) == [1] and watch.fired
