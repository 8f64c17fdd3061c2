"""Fixtures shared by all tests."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real photographs; tests that need them are skipped where it is absent."""
    folder = Path(os.environ.get("SUPERCLIP_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "coco" / "annotations").is_dir():
        pytest.skip(f"no real photographs at {folder} (set SUPERCLIP_REAL_DATA)")
    return folder


SIZES = [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))]
"""Gloo processes of a test; three show order effects that two hide."""


def free_port() -> int:
    """For processes to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(*words: str, threads: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` as a user would."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=280,
    )


def refused(*words: str, cwd: Path = ROOT) -> str:
    """The one line on stderr, after any warnings, of a command that must fail with status 2."""
    done = command(*words, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of 32 held-out scenes, so that an evaluation takes no time."""
    from superclip.data.scenes import Scenes
    from superclip.data.shard_writer import write_shards

    out, scenes = tmp_path_factory.mktemp("few"), Scenes("val", 32)
    write_shards(((scenes.read(row), [row]) for row in range(32)), out, "val")
    return out / "val-000000.tar"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished, barely trained SuperCLIP run on scenes."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    words = (
        "superclip.train --train-num-samples 256 --batch-size 32 --head-vocab seen --log-every 4"
    )
    done = command(*words.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


warnings.filterwarnings("ignore", message="No pretrained weights")
