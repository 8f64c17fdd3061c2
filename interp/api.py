"""What the commands do, from Python: `from interp import load, sweep, ablate`.

Options are those of the commands with underscores, so `--max-memory 2` is `max_memory=2`, and so
are the files: results are written beside the checkpoint, and what stands there is opened, not
computed again, if it is what is asked for now. In the examples `ckpt` is a SuperCLIP trained for
seconds and swept as in that of `sweep`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

from interp import removal, swept, timeline
from interp.analysis import Findings, analyse
from interp.compare import compare_one
from interp.config import (
    PAIRS,
    AblateConfig,
    CircuitConfig,
    CompareConfig,
    LensConfig,
    OfSweep,
    PatchConfig,
    RelevanceConfig,
    SweepConfig,
)
from interp.heads import Head
from interp.hooked import HookedVisionTransformer
from interp.render.figures import heat_map, layers_plot
from interp.render.gallery import gallery
from interp.render.patterns import Opened
from interp.results import SweepResults
from interp.subject import default_folder, open_pictures, open_subject
from interp.sweep import is_swept, render, standing, sweep_one
from superclip.errors import UserError, nearest
from superclip.model.weights import newest_checkpoint

Config = TypeVar("Config", bound=SweepConfig | OfSweep)
Paths = Path | str | Sequence[Path | str]
FIGURES = {"patch": "patching.figure", "lens": "lens.lens_figure", "circuit": "circuit.draw"}
FIGURES |= {"timeline": "course.figure"}


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """A sweep; as text, what its command prints."""

    results: SweepResults
    findings: Findings

    def __repr__(self) -> str:
        return render(self.results, self.findings)

    def heat_map(self) -> Figure:
        """Excess of every head, the champion framed."""
        return heat_map(self.results, self.findings)

    def layers(self) -> Figure:
        """Every head's excess with its band, layer by layer, beside the baselines."""
        return layers_plot(self.results, self.findings)

    def gallery(self, head: Head | None = None) -> Figure:
        """Attention of a head, by default the champion, on the pictures that were kept."""
        return gallery(self.results, head or self.findings.champion)


class Report(dict[str, Any]):
    """What a command found, as its JSON holds it; as text, what the command prints."""

    def __init__(self, command: str, found: Mapping[str, Any]) -> None:
        super().__init__(found)
        self.command = command

    def __repr__(self) -> str:
        return import_module(f"interp.{self.command}").render(self)

    def figure(self) -> Figure:
        """Its picture, where the command draws one."""
        if self.command not in FIGURES:
            raise UserError(f"a report of interp.{self.command} has no picture; print it")
        module, _, name = FIGURES[self.command].partition(".")
        return getattr(import_module(f"interp.render.{module}"), name)(self)


def load(ckpt: Path | str | None = None, **options: Any) -> Opened:
    """Open a checkpoint (default: the newest under logs/) to look at pictures, which `model`,
    `pretrained`, `data`, `root`, `split` and `num` name as for a sweep.

    >>> opened = load(ckpt)
    >>> opened
    superclip scenes-vit (GELU), sha256 ...: 4 x 4 heads over 5 x 5 patches; pictures: scenes...
    >>> opened.look(3).maps.shape
    (4, 4, 25)
    """
    config = _config(SweepConfig, ckpt, options)
    subject, run = open_subject(config.ckpt, config.model, config.pretrained)
    source, _ = open_pictures(config.data, config.root, config.split, config.num, run)
    return Opened(subject, HookedVisionTransformer(subject.captioned.clip.visual), source)


def sweep(ckpt: Path | str | None = None, **options: Any) -> Sweep:
    """Which head looks at the objects? `interp.sweep` of one checkpoint.

    >>> swept = sweep(ckpt, num=220, draws=199, untrained=1)
    >>> swept.results.maps.shape, swept.findings.verdict.band.n
    ((178, 4, 4, 25), 58)
    >>> sweep(ckpt, num=220, draws=999, untrained=1)
    Traceback (most recent call last):
    superclip.errors.UserError: ... holds a sweep with another --draws than asked for; ...
    """
    config = _config(SweepConfig, ckpt, options)
    folder = config.out or default_folder(config.ckpt, config.kind)
    if config.overwrite or not is_swept(folder):
        return Sweep(*sweep_one(config)[:2])
    subject, run = open_subject(config.ckpt, config.model, config.pretrained)
    source, _ = open_pictures(config.data, config.root, config.split, config.num, run)
    results = standing(folder, config, subject.facts["sha256"], source.digest)
    return Sweep(results, analyse(results))


def course(ckpt: Path | str = "logs/step_*.pt", **options: Any) -> Report:
    """When does grounding appear? Sweeps of all checkpoints of a run that match a pattern.

    Options are those of `sweep`; untrained towers, the same for all, are swept with the last.

    >>> found = course(ckpt.parent / "*.pt", num=220, draws=199, untrained=1)
    >>> found["steps"], sorted(found["curves"])[:4]
    ([40, 80], ['L0', 'L1', 'L2', 'L3'])
    """
    config = _config(SweepConfig, ckpt, options)
    checkpoints = timeline.numbered(Path(ckpt))
    towers = [0] * (len(checkpoints) - 1) + [config.untrained]
    steps, results = [step for step, _ in checkpoints], []
    for (_, path), untrained in zip(checkpoints, towers):
        results.append(sweep(path, **options | {"untrained": untrained}).results)
    return Report("timeline", timeline.grounding(steps, results, config.draws))


def ablate(ckpt: Path | str | None = None, **options: Any) -> Report:
    """What is lost without heads, MLPs or layers? `interp.ablate` of a swept checkpoint.

    >>> ablate(ckpt, units="L3H1,mlps", kinds=["mean"], sets=0, draws=199)["n"]
    58
    """
    return _report("ablate", "ablation.json", _config(AblateConfig, ckpt, options))


def patch(ckpt: Path | str | None = None, **options: Any) -> Report:
    """Which heads carry an object, by where they look? `interp.patch` of a swept checkpoint.

    >>> patch(ckpt, pairs="colour", draws=199)  # seconds of training tell few colours apart
    Traceback (most recent call last):
    superclip.errors.UserError: only ... of 58 pairs differ by --tau 0.01 in the metric, 20 are ...
    """
    return _report("patch", "patching.json", _config(PatchConfig, ckpt, options))


def lens(ckpt: Path | str | None = None, **options: Any) -> Report:
    """From which layer on can a word be read? `interp.lens` of a swept checkpoint.

    >>> [row["concept"] for row in lens(ckpt, concepts="red,blue", draws=199)["concepts"]]
    ['red', 'blue']
    """
    return _report("lens", "lens.json", _config(LensConfig, ckpt, options))


def relevance(ckpt: Path | str | None = None, **options: Any) -> Report:
    """Do relevance maps find the objects? `interp.relevance` of a swept checkpoint.

    >>> relevance(ckpt, methods="rollout", draws=199)["methods"]
    ['attention', 'rollout']
    """
    return _report("relevance", "relevance.json", _config(RelevanceConfig, ckpt, options))


def circuit(ckpt: Path | str | None = None, **options: Any) -> Report:
    """Which heads suffice for the margin? `interp.circuit` of a swept checkpoint.

    >>> circuit(ckpt, pictures=20, sets=1, steps=1, draws=199)["nodes"]
    16
    """
    return _report("circuit", "circuit.json", _config(CircuitConfig, ckpt, options))


def compare(first: Paths, second: Paths, **options: Any) -> Report:
    """What does one checkpoint look at and depend on, and another not? `interp.compare` of two
    swept checkpoints, or of two lists of them, a seed each.

    >>> compare(ckpt, [])
    Traceback (most recent call last):
    superclip.errors.UserError: the second side names no checkpoint
    """
    sides = [[Path(p) for p in ([s] if isinstance(s, str | Path) else s)] for s in (first, second)]
    for name, side in zip(("first", "second"), sides):
        if not side:
            raise UserError(f"the {name} side names no checkpoint")
    options["also"] = [Path(path) for path in options.get("also", ())]
    options |= {"ckpts": sides[0], "against": sides[1]}
    return Report("compare", compare_one(_config(CompareConfig, None, options))[0])


def _config(cls: type[Config], ckpt: Path | str | None, options: Mapping[str, Any]) -> Config:
    """The command's own configuration; texts may stand for paths, lists for tuples."""
    given, known = dict(options), [f.name for f in fields(cls)]
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"unknown option {unknown[0]}; {nearest(unknown[0], known)}")
    if ckpt is None and cls is not CompareConfig and given.get("model") is None:
        ckpt = newest_checkpoint(Path("logs"))
    given |= {name: Path(given[name]) for name in ("root", "results", "out") if given.get(name)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    config = cls(ckpt=None if ckpt is None else Path(ckpt), **given)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return config


def _report(command: str, name: str, config: OfSweep) -> Report:
    """The report that stands, else a new one."""
    module = import_module(f"interp.{command}")
    if isinstance(config, AblateConfig):
        schema, asked = removal.SCHEMA, removal.asked(config)
    else:
        schema, asked = module.SCHEMA, swept.asked(config)
    # A list of pairs goes by its name; what it holds may be another one by now.
    listed = isinstance(config, PatchConfig) and config.pairs not in PAIRS
    found = None if listed else swept.standing(config, name, schema, asked)
    fresh = found or json.loads(json.dumps(getattr(module, f"{command}_one")(config)[0]))
    return Report(command, fresh)
