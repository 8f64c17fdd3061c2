"""Speed and memory of sweep, training, loader and scenes, as ratios measured in one run.

All sides of a comparison run interleaved, round by round in alternating order, after one untimed
pass each, so that a busy machine slows all. Printed are medians over the rounds with their range,
of wall and of CPU time (all threads of this process; reader processes aside). A target is compared
with the medians and never fails the command.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import tyro

from benches.core import Bench, machine
from benches.interp import AblateBench, SweepBench
from benches.losses import CommBench, LossesBench
from benches.masks import MasksBench
from benches.memory import MemoryBench
from benches.metrics import RetrievalBench, ScenesBench
from benches.trainers import TOKEN_LOSS, FeaturesBench, LoaderBench, TrainBench
from superclip.errors import run_command
from superclip.flags import parse


def main(argv: list[str]) -> None:
    """Parse, measure, print; write the JSON that was asked for."""
    benches = (
        Annotated[SweepBench, tyro.conf.subcommand("sweep")]
        | Annotated[AblateBench, tyro.conf.subcommand("ablate")]
        | Annotated[TrainBench, tyro.conf.subcommand("train")]
        | Annotated[TrainBench, tyro.conf.subcommand("token-loss", default=TOKEN_LOSS)]
        | Annotated[MasksBench, tyro.conf.subcommand("masks")]
        | Annotated[LossesBench, tyro.conf.subcommand("losses")]
        | Annotated[CommBench, tyro.conf.subcommand("comm")]
        | Annotated[MemoryBench, tyro.conf.subcommand("memory")]
        | Annotated[LoaderBench, tyro.conf.subcommand("loader")]
        | Annotated[FeaturesBench, tyro.conf.subcommand("features")]
        | Annotated[ScenesBench, tyro.conf.subcommand("scenes")]
        | Annotated[RetrievalBench, tyro.conf.subcommand("retrieval")]
    )
    bench: Bench = parse(benches, argv, "python scripts/bench.py", __doc__ or "")
    if bench.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(bench.threads)  # numpy's, read when it loads
        import torch

        torch.set_num_threads(bench.threads)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip reports every construction there
    before, found = os.getloadavg(), bench.run()
    facts, after = machine(), os.getloadavg()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{facts['cpu']}, {facts['cores']} cores, GPU {facts['gpu']}; {versions}")
    print(
        f"{facts['threads']} threads; {bench.rounds} rounds, interleaved; load average "
        f"{before[0]:.1f} before, {after[0]:.1f} after"
    )
    print(*found.notes, sep="\n")
    if found.rows:
        print(f"\n{'':<44}{'':<12}{'wall: median [min, max]':>23}{'CPU: median [min, max]':>31}")
        print(*found.rows, sep="\n")
    if bench.out is not None:
        config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(bench).items()}
        report = {
            "bench": config,
            "machine": facts,
            "load_average": [before, after],
            "notes": found.notes,
            "rows": [row.to_dict() for row in found.rows],
        }
        bench.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
