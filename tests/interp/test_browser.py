"""The page in a real browser: it loads without a complaint, and what it shows are the results.

A script at the end of the page acts as a reader would and leaves what it saw in the document, which
headless Chromium prints; no driver is needed."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from interp.analysis import analyse
from interp.heads import Head
from interp.render import words
from interp.report import build, pages
from interp.results import images_sha256
from tests.interp.sweeps import PLANTED, small_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

WATCH = """<script>
window.complaints = [];
addEventListener("error", (e) => complaints.push(String(e.message)));
addEventListener("unhandledrejection", (e) => complaints.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => complaints.push(e.violatedDirective));
console.error = (...told) => complaints.push(told.join(" "));
</script>"""

ACT = """<script>
(async () => {
  const seen = {};
  const page = document, all = (q) => [...page.querySelectorAll(q)];
  const texts = (q) => all(q).map((e) => e.textContent);
  const drawn = async (name) => {
    while (page.querySelector("#explorer").dataset.drawn !== name) {
      await new Promise((go) => setTimeout(go, 20));
    }
  };
  const set = (name, value) => {
    const select = page.querySelector(`[data-part=${name}]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  };
  const sums = () => all(".cards canvas:last-child").map((c) =>
    c.getContext("2d").getImageData(0, 0, c.width, c.height).data.reduce((a, b) => a + b, 0));
  await drawn("CHAMPION");
  seen.layers = all("[data-part=rows] tr").map((r) => [...r.cells].map((c) => c.textContent));
  seen.levels = texts("[data-part=keys] li");
  seen.points = all(".layers [data-head]").map((c) => c.textContent);
  seen.csv = decodeURIComponent(page.querySelector("[data-part=csv]").href).split("\\n");
  seen.cells = texts(".grid td button");
  seen.labels = all(".grid td button").map((b) => b.getAttribute("aria-label"));
  seen.first = texts("[data-part=head]")[0];
  seen.before = sums();
  page.querySelector("[data-head=OTHER]").click();
  await drawn("OTHER");
  seen.after = sums();
  seen.clicked = texts("[data-part=head]")[0];
  seen.facts = texts("[data-part=facts] dd");
  seen.captions = texts(".cards figcaption");
  seen.pressed = all("[aria-pressed=true]").map((b) => b.dataset.head);
  const button = page.querySelector("[data-head=OTHER]");
  button.focus();
  button.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
  seen.focused = page.activeElement.dataset.head;
  seen.described = texts("[data-part=head]")[0];
  set("metric", "2");
  seen.auroc = texts(".grid td button");
  set("split", "discovery");
  seen.chooses = texts(".grid td button");
  const search = page.querySelector(".filter input[type=search]");
  search.value = "L1";
  search.dispatchEvent(new Event("input", {bubbles: true}));
  seen.rows = all("tr[data-head]").filter((r) => !r.hidden).map((r) => r.dataset.head);
  seen.count = texts(".filter [role=status]")[0];
  search.value = "";
  search.dispatchEvent(new Event("input", {bubbles: true}));
  all("th button").find((b) => b.textContent === "AUROC").click();
  seen.sorted = all("tr[data-head]").map((r) => r.dataset.head);
  seen.wide = page.documentElement.scrollWidth > innerWidth;
  seen.complaints = complaints;
  const out = page.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  page.body.append(out);
})();
</script>"""


HOSTILE = (
    "</script><img src=x onerror=complain()> \U0001f440 \u202e\u05e9\u05dc\u05d5\u05dd $x_1$ \"'"
    + "a" * 10_000
)


@pytest.fixture(scope="module", params=["desktop", "phone", "large"])
def results(request):
    """On the phone, of a model, data and pictures with the names that break a page; and of a tower
    as large as ViT-B/32, on the phone too."""
    if request.param == "large":
        return small_sweep(0, 8, shape=(12, 12), side=7, pixels=56)
    found = small_sweep()
    if request.param == "desktop":
        return found
    manifest = json.loads(json.dumps(found.manifest))
    manifest["checkpoint"]["model"] = manifest["data"]["name"] = HOSTILE
    ids = np.array([f"{k}{HOSTILE}" for k in range(len(found.image_ids))])
    manifest["images_sha256"] = images_sha256(ids, found.coverage)
    return dataclasses.replace(found, manifest=manifest, image_ids=ids)


@pytest.fixture(scope="module")
def seen(results, tmp_path_factory):
    """What a reader saw who clicked, walked by keys, filtered and sorted."""
    wide = results.shape == (2, 3) and "aaaa" not in str(results.image_ids[0])
    folder = tmp_path_factory.mktemp("page")
    results.save(folder / "sweep")
    folders, out = [folder / "sweep"], folder / "report.html"
    page = pages(folders, out, build(folders))[out].decode()
    act = ACT.replace("CHAMPION", str(analyse(results).champion)).replace("OTHER", "L0H1")
    page = page.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{act}</body>")
    out.write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    size = f"--window-size={1280 if wide else 390},900"
    words = [CHROMIUM, *flags, size, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([*words, out.as_uri()], capture_output=True, text=True, timeout=240)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_page_loads_without_a_complaint_and_fits(seen):
    assert seen["complaints"] == [] and not seen["wide"]


def test_cells_are_the_values_of_the_results(seen, results):
    findings = analyse(results)
    dense = results.shape[1] > 6

    def cells(values):
        texts = [words.number(v, 3) for v in values.ravel()]
        return [re.sub(r"^(−?)0\.", r"\1.", text) for text in texts] if dense else texts

    assert seen["cells"] == cells(findings.verdict.band.estimate)
    for split in ("auroc", "chooses"):
        rows = results.rows("validation" if split == "auroc" else "discovery")
        values = np.nanmean(results.metrics["patch_auroc"][rows].astype(float), axis=0)
        assert seen[split] == cells(values)
    at = np.ravel_multi_index(PLANTED, results.shape)
    assert [label for label in seen["labels"] if "champion" in label] == [seen["labels"][at]]


def test_the_layers_are_the_values_of_the_results(seen, results):
    findings = analyse(results)
    band, heads = findings.verdict.band, results.shape[1]
    for layer, (values, shown) in enumerate(zip(band.estimate, seen["layers"], strict=True)):
        cells = [words.number(v, 4) for v in np.quantile(values, [0, 0.25, 0.5, 0.75, 1])]
        assert shown == [f"L{layer}", str(heads), *cells, f"H{values.argmax()}"]
    told = [f"{Head(*at)}: {words.number(v, 4)}" for at, v in np.ndenumerate(band.estimate)]
    assert seen["points"] == told
    own = [row.excess.estimate for row in findings.baselines if row.excess]
    values = [text.removesuffix(", off the scale").split()[-1] for text in seen["levels"]]
    assert values[0] == "0.0000" and len(values) == 3
    assert set(values[1:]) <= {words.number(v, 4) for v in own}
    assert len(seen["csv"]) == 1 + band.estimate.size
    head, layer, index, *_, low, high = seen["csv"][-1].split(",")
    assert head == f"L{layer}H{index}" == str(Head(*(size - 1 for size in results.shape)))
    assert [float(low), float(high)] == pytest.approx([band.low[-1, -1], band.high[-1, -1]])


def test_a_click_opens_the_gallery_of_that_head(seen, results):
    findings = analyse(results)
    assert seen["first"] == f"{findings.champion}, the champion" and seen["clicked"] == "L0H1"
    assert seen["pressed"] == ["L0H1"]
    assert all(a != b for a, b in zip(seen["before"], seen["after"], strict=True))
    kept = results.gallery_rows[: len(seen["captions"])]
    for row, caption in zip(kept, seen["captions"], strict=True):
        mass = float(results.metrics["in_box_mass"][row, 0, 1])
        assert caption.startswith(f"in-box mass {words.number(mass)}, area ")
    row = words.head_row(findings, Head(0, 1))
    assert words.number(row["discovery_excess"], 4) in seen["facts"][1]


def test_keys_filter_and_sorting(seen, results):
    assert seen["focused"] == "L1H1" and seen["described"] == "L1H1"
    layers, heads = results.shape
    assert seen["rows"] == [f"L1H{k}" for k in range(heads)]
    assert seen["count"] == f"{heads} of {layers * heads} heads"
    order = sorted(analyse(results).heads, key=lambda row: -row["patch_auroc"])
    assert seen["sorted"] == [row["head"] for row in order]
