"""One self-contained HTML page from sweeps: no network, no script but its own."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import imageio.v3 as iio
import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from interp.analysis import Findings, category_rows
from interp.heads import Head
from interp.render import animation, circuit, figures, gallery, patching, words
from interp.render.canvas import DARK, DPI, png
from interp.render.explorer import colours, explorer
from interp.render.lens import lens_figure
from interp.results import SweepResults
from interp.stats.intervals import Interval

LARGEST = 10_000_000
"""Bytes that a page stays below; base64 takes four for three."""

_RESERVED = (150_000, 1_000)  # text, tables and their data: of a sheet, and of each of its heads
_FRAMES = 12  # of the page's animation: 18 seconds


@dataclass(frozen=True)
class Picture:
    """A picture file and its words.

    Attributes:
        light: PNG or GIF.
        alt: for who cannot see it. caption: for everybody.
        dark: the same for a dark page, where there is one.
        still: first frame of an animation.
    """

    light: bytes
    alt: str
    caption: str = ""
    dark: bytes = b""
    still: bytes = b""

    @property
    def width(self) -> int:
        """CSS pixels at which an inch of a PNG is an inch."""
        return int.from_bytes(self.light[16:20]) * 96 // DPI


@dataclass(frozen=True)
class Sheet:
    """One sweep as the page shows it.

    Attributes:
        slug: names its section and its picture files.
        evaluation: `eval_val.json` of the same checkpoint.
        beside: other reports on the same pictures, by name; None where there is none.
        categories: the champion by category. further: figures of the other reports.
    """

    slug: str
    results: SweepResults
    findings: Findings
    evaluation: dict[str, Any] | None
    beside: dict[str, dict[str, Any] | None]
    categories: list[dict[str, Any]]
    heat_map: Picture
    layers: Picture
    gallery: Picture
    animation: Picture | None
    explorer: dict[str, Any]
    further: list[tuple[str, Picture]]

    @property
    def ablation(self) -> dict[str, Any] | None:
        return self.beside["ablation"]

    @property
    def name(self) -> str:
        return words.subject(self.results)

    @property
    def answer(self) -> list[str]:
        return words.answer(self.results, self.findings)

    @property
    def removal(self) -> list[str]:
        return words.removal(self.ablation) if self.ablation else []

    @property
    def limits(self) -> list[str]:
        return words.limits(self.results, self.findings, self.evaluation, self.ablation)

    @property
    def baseline_rows(self) -> list[dict[str, Any]]:
        """The baseline table as plain values."""
        rows = [asdict(row) for row in self.findings.baselines]
        return [
            {"baseline": row["name"]}
            | {
                f"{name} {key}": row[name][key] if row[name] else ""
                for name in ("mass", "enrichment", "excess", "difference")
                for key in ("estimate", "low", "high", "n")
            }
            for row in rows
        ]

    @property
    def closest_untrained(self) -> Interval | None:
        gaps = [row.difference for row in words.untrained(self.findings)]
        return min(gaps, key=lambda gap: gap.estimate, default=None)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was swept, name by name."""
        manifest = self.results.manifest
        tower, data, boxes = manifest["tower"], manifest["data"], manifest["boxes"]
        counts = ", ".join(
            f"{name.replace('_', ' ')} {words.count(n)}" for name, n in manifest["counts"].items()
        )
        checkpoint = manifest["checkpoint"]
        titles = {
            "model": "model",
            "loss": "loss",
            "lr": "learning rate",
            "seed": "seed",
            "epoch": "epochs",
            "pretrained": "pretrained",
            "trained_on": "trained on",
            "commit": "commit",
            "sha256": "checkpoint sha256",
        }
        return [
            *((title, str(checkpoint[key])) for key, title in titles.items() if key in checkpoint),
            (
                "tower",
                f"{tower['layers']} layers of {tower['heads']} heads, {tower['grid'][0]} x "
                f"{tower['grid'][1]} patches, {tower['image_size']} px ({tower['geometry']}), "
                f"{tower['activation']}",
            ),
            ("scored", words.attention_of(self.results)),
            ("data", f"{data['name']}, sha256 {data['sha256']}"),
            ("pictures", counts),
            ("strata", f"{manifest['strata']} (quarters of box area x orientation)"),
            (
                "boxes",
                f"{words.count(boxes['boxes'])}, of them {words.count(boxes['crowd'])} crowd "
                f"regions (ignored) and {words.count(boxes['lost_to_crop'])} lost to the crop",
            ),
            ("draws", f"{words.count(manifest['draws'])}, seed {manifest['seed']}"),
        ]


def draw(
    slug: str,
    results: SweepResults,
    findings: Findings,
    evaluation: dict[str, Any] | None,
    beside: dict[str, dict[str, Any] | None],
    challenger: Head | None,
    sheets: int = 1,
) -> Sheet:
    """Everything of one sweep, drawn.

    Args:
        challenger: the head set against the champion; None for a tower of one head.
        sheets: how many share the page, and with it the bytes.
    """
    champion, room = findings.champion, LARGEST // sheets
    for dpi in (DPI, 100, 60):
        picture = png(gallery.gallery(results, champion), dpi)
        if len(picture) * 4 / 3 < 0.4 * room:
            break
    pictures = Picture(
        picture,
        f"Pictures with their boxes beside the attention of {champion}",
        gallery.caption(results, champion),
    )
    heat_map = _themed(figures.heat_map, results, findings, figures.heat_map_marks(findings))
    layers = _themed(
        figures.layers_plot,
        results,
        findings,
        "Excess of every head by layer, with lines for the baselines; the tables hold the values",
    )
    further = [*_further(beside)]
    explored = explorer(results, findings, beside["ablation"], room // 3)
    room -= _RESERVED[0] + _RESERVED[1] * len(findings.heads) + len(_json(explored))
    drawn = [pictures, heat_map, layers, *(figure for _, figure in further)]
    room -= sum(len(p.light) + len(p.dark) for p in drawn) * 4 // 3
    moving = None
    if challenger is not None and gallery.shown(results):
        moving = _animate(results, findings, challenger, min(room * 3 // 4, animation.LARGEST))
    return Sheet(
        slug,
        results,
        findings,
        evaluation,
        beside,
        category_rows(results, champion),
        heat_map,
        layers,
        pictures,
        moving,
        explored,
        further,
    )


def _further(beside: dict[str, dict[str, Any] | None]) -> Iterator[tuple[str, Picture]]:
    """A title and a figure of each report that has one."""
    shown: tuple[tuple[str, str, Callable[..., Figure]], ...] = (
        ("lens", "What each layer says: words read through the lens", lens_figure),
        ("patching", "Which heads carry what was changed", patching.figure),
        ("circuit", "The smallest set of heads that does the work", circuit.draw),
    )
    for name, title, drawn in shown:
        if (report := beside[name]) is not None:
            alt = f"{title}; {name}.json beside the sweep holds every number"
            yield title, Picture(png(drawn(report)), alt, dark=png(drawn(report, DARK)))


def _themed(figure: Any, results: SweepResults, findings: Findings, alt: str) -> Picture:
    return Picture(png(figure(results, findings)), alt, dark=png(figure(results, findings, DARK)))


def _animate(results: SweepResults, findings: Findings, challenger: Head, largest: int) -> Picture:
    frames = animation.frames(results, findings, challenger, _FRAMES)
    still = iio.imwrite("<bytes>", frames[0], extension=".png")
    moving, kept = animation.gif(frames, largest - len(still))
    return Picture(
        moving,
        f"Attention of {findings.champion} and of {challenger} on the same pictures, in turn",
        animation.caption(results, findings, challenger, kept),
        still=still,
    )


def render_page(sheets: Sequence[Sheet], commands: Sequence[str], notes: Sequence[str]) -> str:
    """The page.

    Args:
        commands: shell lines that rebuild it. notes: what they can't tell.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("interp.render", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "span": words.span,
        "number": words.number,
        "percent": words.percent,
        "count": words.count,
        "p": words.p_value,
        "stacked": _stacked,
        "data": _data_uri,
        "csv": _csv_uri,
    }
    environment.globals |= {"span": words.span, "number": words.number, "count": words.count}
    return environment.get_template("page.html.jinja").render(
        sheets=sheets,
        commands=commands,
        command_notes=notes,
        style=_own("page.css"),
        script=_own("page.js"),
        explorer_script=_own("explorer.js"),
        explorer_data=_json({"sheets": [s.explorer for s in sheets], "colours": colours()}),
    )


def _json(values: Any) -> Markup:
    """For a block of JSON in a page: whatever a name holds, it can't end the block."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _own(name: str) -> Markup:
    """A file of this package, which needs no escaping."""
    return Markup((resources.files("interp.render") / name).read_text())


def _stacked(interval: Interval | dict[str, Any], digits: int = 3) -> Markup:
    """An interval in a table's cell: the estimate above its bounds."""
    estimate, bounds = words.span(interval, digits).split(" ", 1)
    return Markup("{} <small>{}</small>").format(estimate, bounds)


def _csv_uri(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of plain values as a file that a link holds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return f"data:text/csv;base64,{base64.b64encode(text.getvalue().encode()).decode()}"


def _data_uri(picture: bytes) -> str:
    kind = "gif" if picture.startswith(b"GIF") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
