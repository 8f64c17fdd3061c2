for (const bar of document.querySelectorAll(".filter")) {
  const [text, box] = bar.querySelectorAll("input"), said = bar.querySelector("[role=status]");
  const rows = [...bar.nextElementSibling.querySelectorAll("tbody tr")];
  bar.hidden = false;
  bar.addEventListener("input", () => {
    const wanted = text.value.trim().toUpperCase();
    for (const row of rows) {
      const [, layer, index] = /(L\d+)(H\d+)/.exec(row.dataset.head);
      const named = !wanted || [layer, index, layer + index].includes(wanted);
      row.hidden = !named || (box.checked && !("significant" in row.dataset));
    }
    said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} heads`;
  });
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") === "descending";
    const key = (row) => row.cells[head.cellIndex].dataset.value;
    const order = (a, b) => (key(a) - key(b)) * (up ? 1 : -1);
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(order));
  });
}
for (const button of document.querySelectorAll("button.toggle")) {
  const still = button.closest("figure").querySelector("source");
  let paused = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => {
    still.media = paused ? "all" : "print";
    button.textContent = paused ? "Play" : "Pause";
  };
  button.hidden = false;
  show();
  button.addEventListener("click", () => {
    paused = !paused;
    show();
  });
}
