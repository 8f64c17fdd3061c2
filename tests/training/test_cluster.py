"""Jobs on a cluster: ranks, hosts and cables that fail, disks that fill, and SLURM's script."""

import contextlib
import inspect
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_interrupted import same_weights, wait_for
from test_resume import record

from superclip.errors import run_command
from superclip.model.weights import damage_of
from superclip.pack import main as pack
from superclip.train import main as train

pytestmark = pytest.mark.dist

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["superclip.training.build", "superclip.training.loop"])
TINY = """{"embed_dim": 16,
 "vision_cfg": {"image_size": 80, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
 "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}"""
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A run of 128 steps of some 20 ms, which evaluates on 16 pictures after every 8."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.json").write_text(TINY)
    pack(["scenes", "--out", str(folder / "scenes"), "--num", "16"])
    words = (
        "--train-num-samples 48 --epochs 16 --global-batch-size 6 --precision fp32 "
        f"--head-vocab seen --threads 1 --log-every 1 --model {folder / 'tiny.json'} "
        f"--val-data coco:{folder / 'scenes'}:all"
    )
    return words.split()


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    """The run on two ranks, left alone."""
    out = tmp_path_factory.mktemp("whole") / "run"
    job = Job(out, flags)
    assert job.ended() == [0, 0], job.said(0) + job.said(1)
    return out


def as_undisturbed(out: Path, undisturbed: Path) -> bool:
    return same_weights(out, undisturbed) and record(out) == record(undisturbed)


class Job:
    """The ranks of a run, with the variables that tell them of one another; nothing watches over
    them. They start in a process that has torch imported, to spare 10 s each."""

    def __init__(self, out: Path, flags: list[str], logs: Path | None = None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        folder = logs or out.parent
        self.logs = [folder / f"{out.name}.{rank}.log" for rank in range(2)]
        self.ranks = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            ids = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            words = [*flags, "--out", str(out)]
            process = FORK.Process(target=rank_main, args=(env | ids, words, log), daemon=True)
            process.start()
            self.ranks.append(process)

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def ended(self) -> list[int | None]:
        """Exit statuses; a rank that does not end is a failure."""
        end = time.monotonic() + 100
        for process in self.ranks:
            process.join(end - time.monotonic())
        hung = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for rank in hung:
            self.ranks[rank].kill()
        assert not hung, "".join(self.said(rank) for rank in hung)
        return [process.exitcode for process in self.ranks]


def rank_main(env: dict[str, str], words: list[str], log: Path) -> None:
    os.environ.update(env)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train", *words]
    run_command(train)


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_of_one_rank_at_twenty_moments(flags, undisturbed, tmp_path):
    """Every other time while a checkpoint is written. The rank that lives ends and names the dead;
    the job that goes on after the last kill ends as if nothing had happened."""
    out, chance, torn = tmp_path / "run", random.Random(0), 0
    words = [*flags, "--save-every", "1", "--keep-last", "2"]
    words += ["--timeout-minutes", "0.5"]  # once in some forty kills gloo's send notices only then
    for number in range(20):
        job, before = Job(out, words), steps_done(out)
        until(lambda before=before: steps_done(out) > before)
        victim = chance.randrange(2)
        if number % 2:
            until(lambda: list(out.glob(".step_*.partial")))
            victim = 0  # the one that writes
        time.sleep(chance.uniform(0, 0.005 if number % 2 else 0.05))
        job.ranks[victim].kill()
        codes = job.ended()
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2, job.said(1 - victim)
        last = job.said(1 - victim).strip().splitlines()[-1]
        assert last.startswith("error: ") and f"rank {victim}" in last
        torn += bool(list(out.glob(".step_*.partial")))
    assert torn, "no kill met a checkpoint half written"
    job = Job(out, words)
    assert job.ended() == [0, 0], job.said(0)
    assert "resuming from step_" in job.said(0)
    assert as_undisturbed(out, undisturbed)
    assert not list(out.glob(".*.partial"))


@pytest.mark.slow
def test_sigterm_during_evaluation_on_two_ranks(flags, tmp_path):
    """Two thousand pictures take seconds, so that the signal meets the evaluation of step 8."""
    words = [*flags, "--epochs", "2", "--val-data", "scenes:val"]
    assert Job(tmp_path / "whole", words).ended() == [0, 0]
    job = Job(tmp_path / "run", words)
    wait_for(tmp_path / "run", 8)
    for process in job.ranks:
        process.terminate()
    assert job.ended() == [0, 0], job.said(0) + job.said(1)
    assert "resubmit to continue" in job.said(0)
    assert [line["step"] for line in record(tmp_path / "run")] == list(range(1, 9))
    assert Job(tmp_path / "run", words).ended() == [0, 0]
    assert as_undisturbed(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 28 MiB, with room for two checkpoints of 10 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=28m", "none", str(disk)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_nothing_but_time(flags, undisturbed, small_disk, tmp_path):
    out, ballast = small_disk / "run", small_disk / "ballast"
    for attempt in ("from the start", "again, without a byte left"):
        if "again" in attempt:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))
        job = Job(out, flags, tmp_path)
        assert job.ended() == [2, 2], job.said(0)
        for rank in range(2):
            assert "Traceback" not in job.said(rank)
            assert "No space left on device" in job.said(rank).strip().splitlines()[-1]
        assert not list(out.glob(".*.partial"))
        whole = sorted(out.glob("epoch_*.pt"))
        assert [p.name for p in whole] == ["epoch_1.pt", "epoch_2.pt"]
        assert [damage_of(p) for p in whole] == [None, None]
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    job = Job(out, flags, tmp_path)
    assert job.ended() == [0, 0], job.said(0)
    assert as_undisturbed(out, undisturbed)


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "superclip.train"]


def below(pid: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [p for child in map(int, found.split()) for p in (child, *below(child))]


@contextlib.contextmanager
def started(words: list[str], log: Path, env: dict[str, str] = ENV) -> Iterator[subprocess.Popen]:
    """A command that writes to a file; it and all below it are gone after the block."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=env, cwd=ROOT)
    try:
        yield process
    finally:
        for pid in [*below(process.pid), process.pid] if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_by_itself(flags, undisturbed, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    words = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    words += [*flags, "--save-every", "1", "--keep-last", "2", "--out", str(out)]
    with started(words, log) as agent:
        wait_for(out, 20)
        os.kill(random.choice(below(agent.pid)), signal.SIGKILL)
        assert agent.wait(200) == 0, log.read_text()
    assert "starting:" in log.read_text() and "resuming from" in log.read_text()
    assert as_undisturbed(out, undisturbed)


STAND_INS = {
    "scontrol": """#!/bin/sh
case "$1" in
    show) echo "$3" ;;
    requeue) echo "$2" >> "$SLURM_SUBMIT_DIR/requeued" ;;
esac
""",
    "squeue": """#!/bin/sh
echo "$JOB_STATE"
""",
    "srun": f"""#!{sys.executable}
import os, signal, subprocess, sys
words = sys.argv[1:]
count = int(os.environ["SLURM_NTASKS"])
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    count = int(value) if name == "--ntasks" else count
open("srun_words", "w").write(" ".join(words))
if "SRUN_STATUS" in os.environ:
    sys.exit(int(os.environ["SRUN_STATUS"]))
tasks = []
{inspect.getsource(below)}
def forward(number, _):
    for pid in [p for task in tasks for p in (task.pid, *below(task.pid))]:
        os.kill(pid, number)
signal.signal(signal.SIGUSR1, forward)
for rank in map(str, range(count)):
    told = dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_STEP_NUM_TASKS=str(count))
    tasks.append(subprocess.Popen(words, env=os.environ | told))
open("srun_pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
""",
}


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job of two tasks on one node, as SLURM's commands and variables make
    it; what its commands leave behind lies in the folder that the job was submitted from."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    home = tmp_path / "submitted"
    home.mkdir()
    (home / "superclip").symlink_to(ROOT / "superclip")
    return ENV | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(home),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "JOB_STATE": "RUNNING",
    }


SCRIPT = ["bash", str(ROOT / "scripts" / "train.slurm")]


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_slurm_script_queues_a_preempted_job_again(launcher, flags, cluster, tmp_path):
    home, out, log = Path(cluster["SLURM_SUBMIT_DIR"]), tmp_path / "run", tmp_path / "log"
    words, env = [*SCRIPT, *flags, "--out", str(out)], cluster | {"LAUNCHER": launcher}
    with started(words, log, env) as job:
        wait_for(out, 3)
        os.kill(int((home / "srun_pid").read_text()), signal.SIGUSR1)
        assert job.wait(100) == 0, log.read_text()
    assert "resubmit to continue" in log.read_text() and "queues itself again" in log.read_text()
    assert (home / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    assert not (out / "final_epoch.pt").exists()
    with started(words, log, env) as job:
        assert job.wait(100) == 0, log.read_text()
    assert "resuming from" in log.read_text() and "2 process(es)" in log.read_text()
    assert (out / "final_epoch.pt").exists()
    assert len((home / "requeued").read_text().split()) == 1


@pytest.mark.parametrize(
    "more, words, status, requeued",
    [
        ({"SRUN_STATUS": "0"}, ["--out", "here"], 0, True),
        ({"SRUN_STATUS": "0", "LAUNCHER": "torchrun"}, [], 0, True),
        ({"SRUN_STATUS": "0", "JOB_STATE": "COMPLETING"}, [], 0, False),  # cancelled, preempted
        ({"SRUN_STATUS": "137"}, [], 137, False),
        ({"SRUN_STATUS": "0"}, ["--out=done", "--epochs", "2"], 0, False),
        ({"SRUN_STATUS": "0"}, ["--help"], 0, False),
        ({"SRUN_STATUS": "0"}, ["--lr", "-1"], 2, False),
        ({"SRUN_STATUS": "0", "LAUNCHER": "mpirun"}, [], 2, False),
        ({"SRUN_STATUS": "0", "SLURM_SUBMIT_DIR": "/"}, [], 2, False),
    ],
)
def test_only_a_job_that_stopped_well_and_early_is_queued_again(
    more, words, status, requeued, cluster, tmp_path
):
    home = Path(cluster["SLURM_SUBMIT_DIR"])
    (home / "done").mkdir()
    (home / "done" / "final_epoch.pt").touch()
    with started([*SCRIPT, *words], tmp_path / "log", cluster | more) as job:
        assert job.wait(60) == status, (tmp_path / "log").read_text()
    assert (home / "requeued").exists() == requeued
    assert (home / "srun_words").exists() == (status != 2 and words != ["--help"])
    if status == 2:
        (line,) = (tmp_path / "log").read_text().splitlines()
        assert line.startswith("error: ")
    elif (home / "srun_words").exists():
        ran = (home / "srun_words").read_text().split()
        assert ran[-1 - len(words) :] == ["superclip.train", *words]


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts joined by a cable, 10.78.0.1 and 10.78.0.2: network namespaces of this one."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command")
    names = f"superclip{os.getpid()}a", f"superclip{os.getpid()}b"
    made = ip("netns", "add", names[0], check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made: {made.stderr.strip()}")
    ip("netns", "add", names[1])
    cable = ["cable", "type", "veth", "peer", "name", "cable", "netns", names[1]]
    try:
        ip("-n", names[0], "link", "add", *cable)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.78.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def on_both(hosts: tuple[str, str], words: list[str], folder: Path) -> list[list[str]]:
    """torchrun's command on each host, which has a name of its own that both resolve."""
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n10.78.0.1 host1\n10.78.0.2 host2\n")
    settle = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
    commands = []
    for rank, name in enumerate(hosts):
        place = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", settle]
        options = f"--nnodes 2 --nproc-per-node 1 --node-rank {rank} --master-addr 10.78.0.1"
        commands.append(
            [*place, f"host{rank + 1}", str(names), *torchrun(*options.split()), *words]
        )
    return commands


@pytest.mark.slow
def test_two_hosts_whose_cable_is_cut(hosts, flags, undisturbed, tmp_path):
    """Both end, naming a rank and a cause; with the cable mended, the same command goes on."""
    out, logs = tmp_path / "run", [tmp_path / "log1", tmp_path / "log2"]
    words = [*flags, "--out", str(out), "--save-every", "1", "--keep-last", "2"]
    first, second = on_both(hosts, [*words, "--timeout-minutes", "0.2"], tmp_path)
    with started(first, logs[0]) as one, started(second, logs[1]) as two:
        wait_for(out, 20)
        ip("-n", hosts[0], "link", "set", "cable", "down")
        codes = one.wait(100), two.wait(100)
    assert 0 not in codes
    for rank, log in enumerate(logs):
        (error,) = [x for x in log.read_text().splitlines() if x.startswith("error: ")]
        assert f"error: rank {rank} of 2 on host{rank + 1} lost its peers: " in error
        assert f"rank {1 - rank}" in error and "imed out" in error
    assert steps_done(out) < 128
    ip("-n", hosts[0], "link", "set", "cable", "up")
    with started(first, logs[0]) as one, started(second, logs[1]) as two:
        assert (one.wait(150), two.wait(150)) == (0, 0), logs[0].read_text() + logs[1].read_text()
    assert "resuming from step_" in logs[0].read_text()
    assert as_undisturbed(out, undisturbed)
