"""`python -m interp.report`: one page and three pictures from the results of sweeps."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.config import ReportConfig, SweepConfig
from interp.heads import Head
from superclip.errors import UserError, replacing, run_command

if TYPE_CHECKING:
    from interp.render.page import Sheet
    from interp.results import SweepResults

DESCRIPTION = """Turn sweeps into one self-contained HTML page, with heatmap.png, gallery.png and
champion_vs_challenger.gif beside it. Every number is computed anew from the results; eval_val.json
beside the checkpoint, and what ablate, relevance, lens, patch and circuit wrote beside the results,
are shown where they stand."""

SIBLINGS = {"ablation": 2, "relevance": 1, "lens": 1, "patching": 1, "circuit": 1}
"""Reports that may stand beside a sweep, with the schema that this version reads."""
COMMANDS = {"ablation": "ablate", "patching": "patch"}
EVALUATION_SCHEMA = 2


def main(argv: list[str]) -> None:
    """Parse, judge, draw, write."""
    from superclip.flags import parse

    config = parse(ReportConfig, argv, "python -m interp.report", DESCRIPTION)
    folders = config.results or (newest_sweep(Path("logs")),)
    folders = tuple(map(folder_of, folders))
    out = config.out or default_page(folders)
    for path in written_paths(folders, out):
        if path.exists() and not config.overwrite:
            raise UserError(f"{path} exists; --overwrite replaces it, --out FILE writes elsewhere")
    challenger = head_of("--challenger", config.challenger) if config.challenger else None
    sheets = build(folders, challenger)
    files = pages(folders, out, sheets, challenger)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        with replacing(path) as partial:
            partial.write_bytes(content)
    for sheet in sheets:
        print(f"{sheet.name}: {sheet.answer[0]}")
    for path, content in files.items():
        print(f"written: {path} ({len(content) / 1e6:.1f} MB)")


def newest_sweep(logs: Path) -> Path:
    """The folder of the sweep written last.

    Raises:
        UserError: if there is none.
    """
    found = [path for path in logs.rglob("results.json") if path.with_suffix(".npz").is_file()]
    if not found:
        raise UserError(
            f"no sweep under {logs}/; run python -m interp.sweep first or give its folder"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def folder_of(path: Path) -> Path:
    """The folder of a sweep, named by itself or by one of its results.

    Raises:
        UserError: if it is another file, or none.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give the folder of a sweep (interp.sweep makes one)")
    if not path.is_file():
        return path
    if path.name in ("results.json", "results.npz"):
        return path.parent
    if path.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{path} is a file; give the folder of a sweep, which holds results.json")
    from interp.subject import default_folder

    folder = default_folder(path)
    swept = (folder / "results.json").is_file()
    way = f"give the folder of its sweep, {folder}"
    raise UserError(
        f"{path} is a checkpoint; "
        + (way if swept else f"run python -m interp.sweep --ckpt {path} first, then {way}")
    )


def head_of(flag: str, name: str) -> Head:
    """The head that an option names.

    Raises:
        UserError: if it is no head.
    """
    try:
        return Head.parse(name)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def default_page(folders: Sequence[Path]) -> Path:
    """In the folder of one sweep; above the folders of several."""
    if len(folders) == 1:
        return folders[0] / "report.html"
    return Path(os.path.commonpath([folder.resolve() for folder in folders])) / "report.html"


def written_paths(folders: Sequence[Path], out: Path) -> list[Path]:
    """The pictures and the page; with several sweeps their number in front."""
    names = ("heatmap.png", "gallery.png", "champion_vs_challenger.gif")
    pictures = [out.with_name(prefix + name) for prefix in _prefixes(folders) for name in names]
    return [*pictures, out]


def _prefixes(folders: Sequence[Path]) -> list[str]:
    return [""] if len(folders) == 1 else [f"{i}_" for i in range(1, len(folders) + 1)]


def build(folders: Sequence[Path], challenger: Head | None = None) -> list[Sheet]:
    """Open, judge and draw each sweep.

    Raises:
        UserError: if a folder holds no usable results, one is given twice, or a sibling file is of
            other pictures.
    """
    from interp.analysis import analyse
    from interp.render.animation import challenger_of
    from interp.render.page import draw
    from interp.results import SweepResults

    opened: dict[str, SweepResults] = {}
    for folder in folders:
        results = SweepResults.load(folder)
        facts = json.dumps(results.manifest, sort_keys=True)
        if facts in opened:
            raise UserError(f"{folder}: this sweep is given twice")
        opened[facts] = results
    sheets = []
    for number, (folder, results) in enumerate(zip(folders, opened.values()), start=1):
        evaluation = read_evaluation(folder, results)
        beside = {name: read_sibling(folder, results, name) for name in SIBLINGS}
        findings = analyse(results)
        rival = challenger_of(findings, challenger)
        slug = f"sweep-{number}"
        sheets.append(draw(slug, results, findings, evaluation, beside, rival, len(folders)))
    return sheets


def pages(
    folders: Sequence[Path], out: Path, sheets: Sequence[Sheet], challenger: Head | None = None
) -> dict[Path, bytes]:
    """Every file of the report and its content, the page last."""
    from interp.render.page import render_page

    files = {}
    for prefix, sheet in zip(_prefixes(folders), sheets):
        files[out.with_name(prefix + "heatmap.png")] = sheet.heat_map.light
        files[out.with_name(prefix + "gallery.png")] = sheet.gallery.light
        if sheet.animation:
            files[out.with_name(prefix + "champion_vs_challenger.gif")] = sheet.animation.light
    commands, notes = rebuild_commands(folders, out, sheets, challenger)
    return files | {out: render_page(sheets, commands, notes).encode()}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent.

    Raises:
        UserError: if it can't be read.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); write it again or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; write it again or remove it")
    return content


def read_evaluation(folder: Path, results: SweepResults) -> dict[str, Any] | None:
    """The evaluation beside the checkpoint, if it is of this very checkpoint.

    Raises:
        UserError: if it is of another schema.
    """
    path = folder.resolve().parent / "eval_val.json"
    found = read_json(path)
    sha256 = results.manifest["checkpoint"]["sha256"]
    if not found or found.get("checkpoint", {}).get("sha256") != sha256:
        return None
    if found.get("schema") != EVALUATION_SCHEMA:
        raise UserError(
            f"{path} has schema {found.get('schema')}; this version reads schema "
            f"{EVALUATION_SCHEMA}: measure again (superclip.evaluate --overwrite)"
        )
    return found


def read_sibling(folder: Path, results: SweepResults, name: str) -> dict[str, Any] | None:
    """A report of `SIBLINGS` beside the sweep.

    Raises:
        UserError: if it is of another schema, checkpoint or set of pictures.
    """
    path = folder / f"{name}.json"
    found = read_json(path)
    if found is None:
        return None
    manifest, command = results.manifest, f"python -m interp.{COMMANDS.get(name, name)}"
    for what, mine, its in (
        ("of another schema than this version reads", SIBLINGS[name], found.get("schema")),
        (
            "of another checkpoint than this sweep",
            manifest["checkpoint"]["sha256"],
            found.get("checkpoint_sha256"),
        ),
        (
            "of other pictures than this sweep (another --num, --data or --split?)",
            manifest["images_sha256"],
            found.get("images_sha256"),
        ),
    ):
        if mine != its:
            raise UserError(
                f"{path} is {what}; run {command} --overwrite for this sweep, or move the file away"
            )
    return found


def rebuild_commands(
    folders: Sequence[Path], out: Path, sheets: Sequence[Sheet], challenger: Head | None
) -> tuple[list[str], list[str]]:
    """Shell lines from training to this page, and what they can't tell."""
    lines, notes = [], []
    for folder, sheet in zip(folders, sheets):
        manifest = sheet.results.manifest
        checkpoint = checkpoint_of(folder, manifest["checkpoint"]["sha256"])
        if checkpoint is None:
            notes.append(
                f"The checkpoint of {folder} (sha256 {manifest['checkpoint']['sha256']}) does not "
                "stand beside it; CKPT stands for its file."
            )
        subject = ["--ckpt", str(checkpoint or "CKPT")]
        if manifest["checkpoint"]["loss"] == "unknown":
            subject += ["--model", manifest["checkpoint"]["model"]]
        run = read_json(checkpoint.with_name("run.json")) if checkpoint else None
        if run:
            lines.append(_train_line(run))
        if sheet.evaluation:
            lines.append(_line("superclip.evaluate", *subject))
        lines.append(
            _line("interp.sweep", *subject, *_sweep_flags(sheet.results), "--out", str(folder))
        )
        for name in SIBLINGS:
            if sheet.beside[name]:
                command = f"interp.{COMMANDS.get(name, name)}"
                lines.append(_line(command, *subject, "--results", str(folder)))
    notes.append(
        "Data are named by their hash above; a sweep of other data than the checkpoint's own also "
        "needs its --data, --root and --split."
    )
    flags = ["--challenger", str(challenger)] if challenger else []
    lines.append(_line("interp.report", *map(str, folders), "--out", str(out), *flags))
    return lines, notes


def _line(module: str, *words: str) -> str:
    return shlex.join(["python", "-m", module, *words])


def _train_line(run: dict[str, Any]) -> str:
    words = ["superclip.train", *run["command"][1:]]
    if run["world_size"] > 1:
        return shlex.join(["torchrun", "--nproc-per-node", str(run["world_size"]), "-m", *words])
    return shlex.join(["python", "-m", *words])


def _sweep_flags(results: SweepResults) -> list[str]:
    """The options of a sweep that differ from their defaults, read off its results."""
    manifest, default = results.manifest, SweepConfig()
    used = {
        "kind": manifest["kind"],
        "metric": "legacy-mass" if "legacy_mass" in results.metrics else "excess",
        "num": manifest["counts"]["listed"],
        "untrained": len(manifest["untrained"]),
        "draws": manifest["draws"],
        "seed": manifest["seed"],
        "gallery": len(results.gallery_rows),
    }
    changed = {name: value for name, value in used.items() if value != getattr(default, name)}
    flags = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    return flags + ["--allow-trained"] * manifest["trained_pictures_allowed"]


def checkpoint_of(folder: Path, sha256: str) -> Path | None:
    """The checkpoint above a sweep's folder with this hash."""
    stem = folder.name.removeprefix("sweep").removesuffix("-patches").lstrip("-") or "final_epoch"
    path = folder.parent / f"{stem}.pt"
    if not path.is_file():
        return None
    return path if hashlib.sha256(path.read_bytes()).hexdigest() == sha256 else None


if __name__ == "__main__":
    run_command(main)
