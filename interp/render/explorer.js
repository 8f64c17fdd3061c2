// The explorer: a grid of heads to hover, click and walk through by keys, and the clicked head on
// the sweep's pictures. All values come from the JSON block; nothing is fetched.
const explorer = document.querySelector("#explorer");
if (explorer) {
  const {sheets, colours} = JSON.parse(document.querySelector("#explorer-data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const shades = Object.fromEntries(Object.entries(colours).map(([k, v]) => [k, bytes(v)]));
  const part = (name) => explorer.querySelector(`[data-part="${name}"]`);
  const make = (tag, text = "", className = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const number = (value, digits) => {
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  };
  let sheet, metric, split, chosen, maps;

  const shade = (of, share) => {
    const k = 3 * Math.round(255 * Math.min(1, Math.max(0, share)));
    return [of[k], of[k + 1], of[k + 2]];
  };
  const values = () => split === "validation" ? metric.validation.estimate : metric.discovery;
  const interval = (l, h) => {
    const {estimate, low, high} = metric.validation, d = metric.digits;
    return `${number(estimate[l][h], d)} [${number(low[l][h], d)}, ${number(high[l][h], d)}]`;
  };

  const describe = (name) => {
    const [, l, h] = /L(\d+)H(\d+)/.exec(name).map(Number);
    const value = values()[l][h];
    const lines = sheet.facts[name].map(([term, words]) => {
      const row = make("div");
      row.append(make("dt", term), make("dd", words));
      return row;
    });
    const shown = value === null ? "not measured"
      : split === "validation" ? interval(l, h) : number(value, metric.digits);
    part("head").textContent = name + (name === sheet.champion ? ", the champion" : "");
    part("value").textContent = `${metric.name}, ${split}: ${shown}`;
    part("facts").replaceChildren(...lines);
  };

  const colour = () => {
    const flat = values().flat().filter((v) => v !== null), chance = metric.chance;
    const reach = Math.max(...flat.map((v) => Math.abs(v - (chance ?? 0)))) || 1;
    for (const button of explorer.querySelectorAll("td button")) {
      const {l, h} = button.dataset, value = values()[l][h];
      const share = chance === null ? value / reach : 0.5 + (value - chance) / reach / 2;
      const [r, g, b] = value === null ? [128, 128, 128]
        : shade(chance === null ? shades.share : shades.signed, share);
      button.style.background = `rgb(${r},${g},${b})`;
      button.style.color = 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff";
      button.textContent = value === null ? "–" : number(value, Math.min(metric.digits, 3));
      const name = `L${l}H${h}`, marks = [name, `${metric.name} ${button.textContent}`];
      if (sheet.significant.includes(name)) marks.push("significant on discovery");
      if (name === sheet.champion) marks.push("champion");
      button.setAttribute("aria-label", marks.join(", "));
    }
    const around = chance === null ? "from 0" : `around chance, ${number(chance, 3)}`;
    const n = split === "validation" ? `; n = ${metric.validation.n}` : "";
    part("scale").textContent = `Colours: ${metric.name} on ${split}, ${around}, to ${
      number((chance ?? 0) + reach, 3)}${n}. Frame: champion. Dot: significant on discovery.`;
    describe(chosen);
  };

  const draw = async (name) => {
    delete explorer.dataset.drawn;
    const [, l, h] = /L(\d+)H(\d+)/.exec(name).map(Number);
    const [rows, columns] = sheet.grid, patches = rows * columns;
    part("shown").textContent = sheet.pictures.length
      ? `${name} on the first ${sheet.pictures.length} pictures that the sweep kept, not picked by score. ` +
        `Colours from 0 to ${number(sheet.largest[l][h], 3)} of its attention to patches, one scale for all.`
      : "The sweep kept no pictures (--gallery 0).";
    const cards = part("pictures").children;
    for (const [i, picture] of sheet.pictures.entries()) {
      if (chosen !== name) return; // another head was clicked meanwhile
      const [plain, canvas] = cards[i].querySelectorAll("canvas"), image = new Image();
      image.src = picture.src;
      await image.decode();
      const side = image.naturalWidth, [under, context] = [plain, canvas].map((one) => {
        one.width = one.height = side;
        return one.getContext("2d", {willReadFrequently: true});
      });
      under.drawImage(image, 0, 0);
      const pixels = under.getImageData(0, 0, side, side), data = pixels.data;
      const first = ((i * sheet.layers + l) * sheet.heads + h) * patches;
      for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
        const k = 4 * (y * side + x);
        const grey = (0.299 * data[k] + 0.587 * data[k + 1] + 0.114 * data[k + 2] + 128) / 2;
        const patch = Math.floor(y * rows / side) * columns + Math.floor(x * columns / side);
        const over = shade(shades.attention, maps[first + patch] / 255);
        for (let c = 0; c < 3; c++) data[k + c] = 0.35 * grey + 0.65 * over[c];
      }
      context.putImageData(pixels, 0, 0);
      for (const on of [under, context]) for (const [ink, width] of [["#000", 40], ["#fff", 90]]) {
        Object.assign(on, {strokeStyle: ink, lineWidth: side / width});
        for (const [a, b, c, d] of picture.boxes) {
          on.strokeRect(a * side, b * side, (c - a) * side, (d - b) * side);
        }
      }
      canvas.setAttribute("aria-label", `Attention of ${name} on ${picture.name}`);
      cards[i].querySelector("figcaption").textContent =
        `in-box mass ${number(picture.mass[l][h], 3)}, area ${picture.area}; ${picture.split}, ${picture.name}`;
    }
    if (chosen === name) explorer.dataset.drawn = name; // for who waits for the pictures
  };

  const choose = (name) => {
    chosen = name;
    for (const button of explorer.querySelectorAll("td button")) {
      const mine = button.dataset.head === name;
      button.setAttribute("aria-pressed", mine);
      button.tabIndex = mine ? 0 : -1;
    }
    describe(name);
    return draw(name);
  };

  const open = (index) => {
    sheet = sheets[index];
    maps = bytes(sheet.maps);
    const table = make("table");
    const top = table.createTHead().insertRow();
    top.append(make("td"));
    for (let h = 0; h < sheet.heads; h++) {
      top.append(Object.assign(make("th", `H${h}`), {scope: "col"}));
    }
    const body = table.createTBody();
    for (let l = 0; l < sheet.layers; l++) {
      const row = body.insertRow();
      row.append(Object.assign(make("th", `L${l}`), {scope: "row"}));
      for (let h = 0; h < sheet.heads; h++) {
        const button = make("button"), name = `L${l}H${h}`;
        Object.assign(button.dataset, {l, h, head: name});
        button.type = "button";
        if (name === sheet.champion) button.classList.add("champion");
        if (sheet.significant.includes(name)) button.classList.add("significant");
        button.addEventListener("click", () => choose(name));
        button.addEventListener("pointerenter", () => describe(name));
        button.addEventListener("focus", () => describe(name));
        row.insertCell().append(button);
      }
    }
    table.addEventListener("pointerleave", () => describe(chosen));
    table.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
      const from = event.target.dataset;
      if (!step || !from.head) return;
      const to = `L${Number(from.l) + step[0]}H${Number(from.h) + step[1]}`;
      const target = table.querySelector(`[data-head="${to}"]`);
      if (target) { event.preventDefault(); target.focus(); }
    });
    part("grid").replaceChildren(table);
    part("metric").replaceChildren(...sheet.metrics.map((m, k) =>
      Object.assign(make("option", m.name), {value: k})));
    part("baselines").replaceChildren(...sheet.baselines.map((cells) => {
      const row = make("tr");
      row.append(Object.assign(make("th", cells[0]), {scope: "row"}));
      row.append(...cells.slice(1).map((text) => make("td", text)));
      return row;
    }));
    part("pictures").replaceChildren(...sheet.pictures.map((picture) => {
      const card = make("figure"), pair = make("div", "", "twin");
      const [plain, canvas] = [make("canvas"), make("canvas")];
      for (const one of [plain, canvas]) one.setAttribute("role", "img");
      plain.setAttribute("aria-label", `Picture ${picture.name} with its boxes`);
      pair.append(plain, canvas);
      card.append(pair, make("figcaption"));
      return card;
    }));
    chosen = sheet.champion;
    pick();
    choose(chosen);
  };

  const pick = () => {
    metric = sheet.metrics[part("metric").value];
    const only = metric.discovery === null;
    part("split").querySelector("[value=discovery]").disabled = only;
    if (only) part("split").value = "validation";
    split = part("split").value;
    colour();
  };
  for (const name of ["metric", "split"]) part(name).addEventListener("change", pick);
  part("sheet").replaceChildren(...sheets.map((s, k) => Object.assign(make("option", s.name), {value: k})));
  part("sheet").addEventListener("change", (event) => open(event.target.value));
  part("sheet").closest("label").hidden = sheets.length < 2;
  explorer.hidden = false;
  open(0);
}
