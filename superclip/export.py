"""`python -m superclip.export`: a checkpoint in the forms that other people's tools open."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from superclip.errors import UserError, check_checkpoint, check_writable, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from superclip.model.weights import Checkpoint

DESCRIPTION = """Write a checkpoint as a folder that other tools open, with a model card in it.

--to open_clip: weights (safetensors), configuration and preprocessing for plain open_clip, and so
for CLIP_benchmark. The token head lies beside them, where open_clip does not look.

  python -m superclip.export --ckpt logs/final_epoch.pt --to open_clip --out DIR

  model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
  tokenizer = open_clip.get_tokenizer("local-dir:DIR")

  clip_benchmark eval --model local-dir:DIR --pretrained "" --no_amp --output FILE --dataset ...

--to datacomp: a folder as open_clip's training leaves it (checkpoints/epoch_K.pt, params.txt,
out.log), and info.pkl (text and numbers, no objects), from which DataComp's evaluate.py learns what
to open. EVALSETS is the folder that its download_evalsets.py has filled:

  python -m superclip.export --ckpt logs/final_epoch.pt --to datacomp --out DIR

  python evaluate.py --train_output_dir DIR --data_dir EVALSETS
  python evaluate.py --train_output_dir DIR --data_dir EVALSETS --epoch K --arch ARCH

The first line is for mlfoundations/datacomp, the second for the FastCLIP authors' fork of it
(xywei00/datacomp). ARCH is the model's name if the name alone gives open_clip this model and its
preprocessing, else local-dir:DIR, which takes open_clip 3. The command prints both, filled in.

--to superclip: weights and facts of the checkpoint with a model card, for this package. The only
way for --image-tower with --text-tower: plain open_clip has no such text tower."""

RECORD = "export.json"
"""Says which files of a folder an export wrote: what --overwrite may replace."""


@dataclass(frozen=True)
class ExportConfig:
    """What `superclip.export` writes."""

    ckpt: Path | None = None
    """A checkpoint. Default: the newest under logs/ (numeric order)."""
    to: Literal["open_clip", "datacomp", "superclip"] = "open_clip"
    """The tool that shall open it."""
    out: Path | None = None
    """New folder. Default: open_clip/, datacomp/ or superclip/ beside the checkpoint."""
    overwrite: bool = False
    """Replace the export that --out holds; a file that no export wrote is never replaced."""


def main(argv: list[str]) -> None:
    """Parse, export, say how to open what was written."""
    from superclip.flags import parse

    config = parse(ExportConfig, argv, "python -m superclip.export", DESCRIPTION)
    folder, opening = export(config)
    print(f"written: {folder}\n\n{opening}")


def export(config: ExportConfig) -> tuple[Path, str]:
    """Write the folder, whole or not at all; returns it and the words that say how to open it.

    Raises:
        UserError: if there is no readable checkpoint, or `out` holds what must not be replaced.
    """
    path = config.ckpt or _newest()
    check_checkpoint(path)
    out = (config.out or path.parent / config.to).resolve()
    _refuse_occupied(out, config.overwrite)
    from superclip.model.towers import is_towers  # torch, which no refusal waits for
    from superclip.model.weights import load_checkpoint

    checkpoint = load_checkpoint(path)
    if config.to != "superclip" and is_towers(checkpoint.model_config):
        raise UserError(
            f"--to {config.to}: {path} has a Hugging Face text tower, which plain open_clip can't "
            "open; use --to superclip"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        try:
            if config.to == "open_clip":
                write_open_clip(checkpoint, new)
            elif config.to == "superclip":
                write_superclip(checkpoint, new)
            else:
                write_datacomp(checkpoint, new, out)
        except RuntimeError as error:  # what torch and safetensors make of a full disk
            first = str(error).strip().splitlines()[0]
            raise UserError(f"--out {out} can't be written ({first}); make room") from None
        words = _opening(checkpoint, config.to, Path("DIR"))
        (new / "README.md").write_text(_card(checkpoint, words, config.to))
        files = [str(file.relative_to(new)) for file in new.rglob("*") if not file.is_dir()]
        record = {"checkpoint": path.name, "sha256": checkpoint.sha256, "files": sorted(files)}
        (new / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if out.exists():
            out.rename(Path(scratch) / "old")
        new.rename(out)
    return out, _opening(checkpoint, config.to, out)


def _newest() -> Path:
    from superclip.model.weights import newest_checkpoint

    return newest_checkpoint(Path("logs"))


def _refuse_occupied(out: Path, overwrite: bool) -> None:
    """Only an export may be replaced, and only when asked to."""
    if out == Path():
        raise UserError("--out is empty; name a new folder")
    check_writable(out, "--out")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a new folder")
    held = sorted(out.iterdir()) if out.exists() else []
    if not held:
        return
    try:
        ours = {RECORD, *json.loads((out / RECORD).read_text())["files"]}
        ours |= {str(folder) for file in ours for folder in Path(file).parents}
        foreign = sorted({str(entry.relative_to(out)) for entry in out.rglob("*")} - ours)
    except (OSError, ValueError, KeyError, TypeError):
        foreign = [held[0].name]
    if foreign:
        raise UserError(f"--out {out} holds {foreign[0]!r}, of no export; name a new folder")
    if not overwrite:
        raise UserError(f"--out {out} holds an export; pass --overwrite or name a new folder")


def write_open_clip(checkpoint: Checkpoint, folder: Path) -> None:
    """What `local-dir:` looks for, and the token head where there is one."""
    from safetensors.torch import save_file

    from superclip.data.geometry import PAD_COLOUR
    from superclip.model.factory import RESIZE_MODES, tokenizer

    preprocess, config, head = (
        checkpoint.preprocess,
        checkpoint.model_config,
        checkpoint.model.token_head,
    )
    settings: dict[str, Any] = {
        "size": preprocess.size,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "interpolation": "bicubic",
        "resize_mode": RESIZE_MODES[preprocess.mode],
    }
    if preprocess.mode == "pad":
        settings["fill_color"] = PAD_COLOUR
    content = {"model_cfg": config, "preprocess_cfg": settings}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=1) + "\n")
    save_file(_weights(checkpoint), folder / "open_clip_model.safetensors", {"format": "pt"})
    if "hf_tokenizer_name" in config["text_cfg"]:  # open_clip looks for it in the folder alone
        tokenizer(config).tokenizer.save_pretrained(folder)
    if head is not None:
        facts = {"format": "pt", "source": head.source, "vocabulary": str(head.vocabulary)}
        tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
        save_file(tensors, folder / "token_head.safetensors", facts)


def write_superclip(checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint without what only training needs."""
    import torch

    from superclip.model.weights import read_tensors

    content = read_tensors(checkpoint.path, check=False)
    content.pop("training", None)
    torch.save(content, folder / "final_epoch.pt")


def write_datacomp(checkpoint: Checkpoint, folder: Path, final: Path) -> None:
    """A training folder in open_clip's layout, and what DataComp's evaluate.py reads.

    Args:
        final: where the folder will stand; info.pkl names the checkpoint by its whole path.
    """
    import torch

    from superclip.model.card import recipe_of

    name, file = final.name, f"epoch_{checkpoint.epoch}.pt"
    (folder / "checkpoints").mkdir()
    content = {"epoch": checkpoint.epoch, "name": name, "state_dict": _weights(checkpoint)}
    torch.save(content, folder / "checkpoints" / file)
    (folder / "checkpoints" / "epoch_latest.pt").symlink_to(file)  # where the folder was moved
    if not _name_suffices(checkpoint):
        write_open_clip(checkpoint, folder)
    config = recipe_of(checkpoint)
    info = {
        "scale_config": {
            "model": _architecture(checkpoint, final),
            "batch_size": config.optim.global_batch_size,
            "learning_rate": config.lr,
        },
        "checkpoint": str(final / "checkpoints" / file),
    }
    (folder / "info.pkl").write_bytes(pickle.dumps(info))
    (folder / "params.txt").write_text(_params(checkpoint, name))
    (folder / "out.log").write_text("".join(f"{line}\n" for line in _log(checkpoint)))


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """open_clip's keys exactly, nothing shared, nothing strided."""
    return {name: tensor.clone() for name, tensor in checkpoint.model.clip.state_dict().items()}


def _name_suffices(checkpoint: Checkpoint) -> bool:
    """Whether a name of open_clip's stands for this model and this preprocessing."""
    import open_clip

    from superclip.model.card import recipe_of
    from superclip.model.factory import preprocess_for

    name, config = recipe_of(checkpoint).model.model, checkpoint.model_config
    same = name in open_clip.list_models() and open_clip.get_model_config(name) == config
    return same and preprocess_for(config, "crop") == checkpoint.preprocess


def _architecture(checkpoint: Checkpoint, folder: Path) -> str:
    from superclip.model.card import recipe_of

    name = recipe_of(checkpoint).model.model
    return name if _name_suffices(checkpoint) else f"local-dir:{folder}"


def _params(checkpoint: Checkpoint, name: str) -> str:
    """The run's options in the form of open_clip's params.txt."""
    from superclip.config import to_dict
    from superclip.model.card import recipe_of, without_folders

    config = recipe_of(checkpoint)
    flat: dict[str, Any] = {}
    for option, value in to_dict(config).items():
        flat |= value if isinstance(value, dict) else {option: value}
    _, flat["batch_size"], flat["accum_freq"] = config.optim.dealt(checkpoint.facts["world_size"])
    flat |= {"name": name, "epochs": config.epochs, "lr": config.lr}
    flat["world_size"] = checkpoint.facts["world_size"]
    for option in ("out", "overwrite"):  # of the machine, not of the model
        del flat[option]
    return without_folders("".join(f"{option}: {flat[option]}\n" for option in sorted(flat)))


def _log(checkpoint: Checkpoint) -> Iterator[str]:
    """What metrics.jsonl holds, as lines of open_clip's out.log."""
    from superclip.model.card import recipe_of

    run, folder = _run(checkpoint), checkpoint.path.parent
    yield "- | INFO | Written from metrics.jsonl, which keeps no times."
    record = folder / "metrics.jsonl"
    if not run or not record.is_file():
        return
    whole, per_epoch = recipe_of(checkpoint).optim.global_batch_size, run["steps_per_epoch"]
    for line in record.read_text().splitlines():
        row = json.loads(line)
        epoch, within = divmod(row["step"] - 1, per_epoch)
        if "loss" in row:
            seen, total = (within + 1) * whole, per_epoch * whole
            yield (
                f"- | INFO | Train Epoch: {epoch} [{seen:>{len(str(total))}}/{total} "
                f"({100 * seen / total:.0f}%)] Batch (t): {whole / row['samples_per_s']:.3f}, "
                f"{row['samples_per_s']:#g}/s LR: {row['lr']:5f} "
                f"Logit Scale: {row['scale']:.3f} Loss: {row['loss']:#.5g}"
            )
        scores = [f"{name}: {value:.4f}" for name, value in row.items() if name.startswith("val_")]
        if scores:
            yield f"- | INFO | Eval Epoch: {epoch + 1} " + "\t".join(scores)


def _run(checkpoint: Checkpoint) -> dict[str, Any]:
    """The run.json that belongs to a checkpoint, else nothing."""
    try:
        run = json.loads((checkpoint.path.parent / "run.json").read_text())
        mine = run["init_sha256"] == checkpoint.facts["init_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return run if mine else {}


def _card(checkpoint: Checkpoint, opening: str, to: str) -> str:
    from superclip.model.card import model_card

    reports = []
    for file in sorted(checkpoint.path.parent.glob("eval_*.json")):
        try:
            report = json.loads(file.read_text())
            if report["checkpoint"]["sha256"] == checkpoint.sha256:
                reports.append(report)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another tool's file, or the report of a model that stood here before
    library = "superclip" if to == "superclip" else "open_clip"
    return model_card(checkpoint, opening, _run(checkpoint), reports, library)


def _opening(checkpoint: Checkpoint, to: str, folder: Path) -> str:
    """How to open the export that stands in `folder`."""
    if to == "open_clip":
        lines = f"""```python
import open_clip  # 3 or newer
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
```"""
        head = checkpoint.model.token_head
        if head is None:
            return lines
        reads = {
            "patches": "the mean of the tower's last patch tokens, after the final LayerNorm",
            "pooled": "the projected image feature before it is normalised",
        }[head.source]
        return (
            f"{lines}\n\nThe token head (token_head.safetensors) reads {reads}; open_clip does not "
            "use it."
        )
    if to == "superclip":
        from superclip.model.towers import is_towers

        lines = f"""```python
from pathlib import Path
from superclip.model.factory import tokenizer
from superclip.model.weights import load_checkpoint
found = load_checkpoint(Path("{folder}/final_epoch.pt"))
image_features = found.model.encode_image(pixels)  # uint8 [b, 3, size, size]
text_features = found.model.encode_text(tokenizer(found.model_config)(["a text"]))
```"""
        own = "\n\nIt does not open in plain open_clip, which has no such text tower."
        return lines + (own if is_towers(checkpoint.model_config) else "")
    arch = _architecture(checkpoint, folder)
    lines = f"""```bash
python evaluate.py --train_output_dir {folder} --data_dir EVALSETS
python evaluate.py --train_output_dir {folder} --data_dir EVALSETS \
--epoch {checkpoint.epoch} --arch {arch}
```

The first line is for mlfoundations/datacomp, the second for its fork xywei00/datacomp; EVALSETS is
the folder that download_evalsets.py has filled."""
    if not arch.startswith("local-dir:"):
        return lines
    return (
        f"{lines} open_clip has no name that stands for this model and its preprocessing, so it is "
        "opened as a folder: DataComp's environment needs open_clip 3 or newer, and after moving "
        "the folder export it anew."
    )


if __name__ == "__main__":
    run_command(main)
