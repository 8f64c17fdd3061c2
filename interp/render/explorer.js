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
  let sheet, metric, split, chosen, maps, greys;

  const shade = (of, share) => {
    const k = 3 * Math.round(255 * Math.min(1, Math.max(0, share)));
    return [of[k], of[k + 1], of[k + 2]];
  };
  const values = () => metric[split].estimate;
  const interval = (l, h) => {
    const {estimate, low, high} = metric.validation, d = metric.digits;
    return `${number(estimate[l][h], d)} [${number(low[l][h], d)}, ${number(high[l][h], d)}] (${metric.validation.brackets})`;
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
      const text = value === null ? "–" : number(value, Math.min(metric.digits, 3));
      button.firstChild.textContent = sheet.heads > 6 ? text.replace(/^(−?)0\./, "$1.") : text;
      const name = `L${l}H${h}`, marks = [name, `${metric.name} ${text}`];
      if (sheet.significant.includes(name)) marks.push("significant on discovery");
      if (name === sheet.champion) marks.push("champion");
      button.setAttribute("aria-label", marks.join(", "));
    }
    const around = chance === null ? "from 0" : `around chance, ${number(chance, 3)}`;
    part("scale").textContent = `Colours: ${metric.name} on ${split}, ${around}, to ${
      number((chance ?? 0) + reach, 3)}; n = ${metric[split].n}. Frame: champion. Dot: significant on discovery.`;
    describe(chosen);
    distribute();
  };

  const drawing = part("layers").firstElementChild.namespaceURI;
  const shape = (tag, attributes, text = "") => {
    const element = document.createElementNS(drawing, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };
  const quantile = (sorted, q) => {
    const at = q * (sorted.length - 1), k = Math.floor(at), next = sorted[k + 1] ?? sorted[k];
    return sorted[k] + (at - k) * (next - sorted[k]);
  };

  // Every head a point over its layer, a box around the middle half, baselines as lines.
  const distribute = () => {
    const place = part("layers"), wide = Math.max(240, place.clientWidth), deep = 240;
    const rows = values(), flat = rows.flat().filter((v) => v !== null), chance = metric.chance;
    let low = Math.min(...flat, chance ?? 0), high = Math.max(...flat, chance ?? 0);
    const reach = high - low || 1, near = ([, , v]) => v >= low - reach / 2 && v <= high + reach / 2;
    const levels = metric.levels.map((level) => [...level, near(level)]);
    for (const [, , v, inside] of levels) if (inside) [low, high] = [Math.min(low, v), Math.max(high, v)];
    const left = 46, pad = (high - low || 1) / 16, step = (wide - left) / sheet.layers;
    const y = (v) => 8 + (deep - 30) * (high + pad - v) / (high - low + 2 * pad);
    const svg = shape("svg", {viewBox: `0 0 ${wide} ${deep}`, width: wide, height: deep, role: "img"});
    const line = (name, x1, y1, x2, y2) => svg.append(shape("line", {class: name, x1, y1, x2, y2}));
    const rough = (high - low || 1) / 5, ten = 10 ** Math.floor(Math.log10(rough));
    const tick = ten * [1, 2, 5, 10].find((k) => k * ten >= rough);
    for (let k = Math.ceil(low / tick); k * tick <= high; k++) {
      const text = number(k * tick, Math.max(0, -Math.floor(Math.log10(tick) + 1e-9)));
      svg.append(shape("text", {x: left - 6, y: y(k * tick) + 4, "text-anchor": "end"}, text));
      line("tick", left - 3, y(k * tick), wide, y(k * tick));
    }
    for (const [kind, , v, inside] of levels) if (inside) line(kind, left, y(v), wide, y(v));
    const every = Math.ceil(26 / step), radius = Math.min(4, Math.max(1.8, step / sheet.heads / 2)), lines = [];
    rows.forEach((row, l) => {
      const middle = left + (l + 0.5) * step, own = row.filter((v) => v !== null).sort((a, b) => a - b);
      if (l % every === 0) svg.append(shape("text", {x: middle, y: deep - 5, "text-anchor": "middle"}, `L${l}`));
      if (!own.length) return;
      const [a, q, m, r, z] = [0, 0.25, 0.5, 0.75, 1].map((share) => quantile(own, share));
      const half = 0.42 * step, box = {x: middle - half, y: y(r), width: 2 * half, height: y(q) - y(r)};
      svg.append(shape("rect", {class: "box", ...box}));
      line("median", middle - half, y(m), middle + half, y(m));
      row.forEach((v, h) => {
        if (v === null) return;
        const name = `L${l}H${h}`, x = middle + ((h + 0.5) / sheet.heads - 0.5) * 0.8 * step;
        const point = shape("circle", {cx: x, cy: y(v), r: radius, "data-head": name});
        if (sheet.significant.includes(name)) point.classList.add("significant");
        if (name === sheet.champion) svg.append(shape("circle", {class: "champion", cx: x, cy: y(v), r: radius + 4}));
        point.append(shape("title", {}, `${name}: ${number(v, metric.digits)}`));
        point.addEventListener("click", () => choose(name));
        svg.append(point);
      });
      const cells = [a, q, m, r, z].map((v) => number(v, metric.digits));
      lines.push([`L${l}`, own.length, ...cells, `H${row.indexOf(z)}`]);
    });
    svg.setAttribute("aria-label",
      `${metric.name} by layer, medians: ${lines.map((c) => `${c[0]} ${c[4]}`).join(", ")}; all values in the table below`);
    place.replaceChildren(svg);
    mark();
    part("keys").replaceChildren(...levels.map(([kind, name, v, inside]) => {
      const item = make("li", `${name} ${number(v, metric.digits)}${inside ? "" : ", off the scale"}`);
      const key = shape("svg", {width: 22, height: 8, "aria-hidden": true});
      key.append(shape("line", {class: kind, x1: 0, y1: 4, x2: 22, y2: 4}));
      item.prepend(key);
      return item;
    }));
    part("spread").textContent = `\u2068${sheet.name}\u2069: ${metric.name} on ${split}, layer by layer: every head a point, n = ${metric[split].n}; ` +
      "box and bar: middle half and median of a layer’s heads, described, not tested. Filled: significant on discovery. " +
      `Ring: champion.${levels.length ? " Lines: baselines on validation pictures." : " No baseline has this measure."}`;
    part("rows").replaceChildren(...lines.map(([layer, ...cells]) => {
      const row = make("tr");
      row.append(Object.assign(make("th", layer), {scope: "row"}), ...cells.map((text) => make("td", text)));
      return row;
    }));
    const band = split === "validation" ? ["low", "high"] : [], keys = ["estimate", ...band];
    const table = rows.flatMap((row, l) => row.map((_, h) =>
      [`L${l}H${h}`, l, h, `"${metric.name}"`, split, metric[split].n, ...keys.map((k) => metric[split][k][l][h])]));
    const csv = [["head", "layer", "index", "metric", "split", "n", ...keys], ...table];
    part("csv").href = `data:text/csv,${encodeURIComponent(csv.map((row) => row.join(",")).join("\n"))}`;
  };
  const mark = () => {
    for (const point of part("layers").querySelectorAll("[data-head]")) {
      point.classList.toggle("chosen", point.dataset.head === chosen);
    }
  };

  const outline = (context, picture, side) => {
    for (const [ink, width] of [["#000", 40], ["#fff", 90]]) {
      Object.assign(context, {strokeStyle: ink, lineWidth: side / width});
      for (const [a, b, c, d] of picture.boxes) {
        context.strokeRect(a * side, b * side, (c - a) * side, (d - b) * side);
      }
    }
  };

  // Decoded once: a picture with its boxes, and in grey for attention to lie on.
  const prepare = async (picture, plain) => {
    const image = new Image(), grey = make("canvas");
    image.src = picture.src;
    await image.decode();
    const side = plain.width = plain.height = grey.width = grey.height = image.naturalWidth;
    const context = plain.getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, side, side), data = pixels.data;
    for (let k = 0; k < data.length; k += 4) {
      data.fill((0.299 * data[k] + 0.587 * data[k + 1] + 0.114 * data[k + 2] + 128) / 2, k, k + 3);
    }
    grey.getContext("2d").putImageData(pixels, 0, 0);
    outline(context, picture, side);
    return grey;
  };

  const draw = async (name) => {
    delete explorer.dataset.drawn;
    const [, l, h] = /L(\d+)H(\d+)/.exec(name).map(Number);
    const [rows, columns] = sheet.grid, patches = rows * columns;
    const fitting = sheet.pictures.length, kept = sheet.kept > fitting ? ` (of ${sheet.kept}: more would make the page too large)` : "";
    part("shown").textContent = !sheet.kept ? "The sweep kept no pictures (--gallery 0)."
      : `${name} on the first ${fitting} pictures that the sweep kept${kept}, not picked by score. ` +
        `Colours from 0 to ≥ ${number(sheet.tops[l][h], 3)} of its attention to patches, one scale for all (to the median of the pictures’ largest).`;
    const cards = part("pictures").children, own = greys, patchwork = make("canvas");
    Object.assign(patchwork, {width: columns, height: rows});
    for (const [i, picture] of sheet.pictures.entries()) {
      const grey = await own[i], side = grey.width;
      if (chosen !== name || own !== greys) return; // another was clicked meanwhile
      const first = ((i * sheet.layers + l) * sheet.heads + h) * patches, image = new ImageData(columns, rows);
      for (let k = 0; k < patches; k++) {
        image.data.set([...shade(shades.attention, maps[first + k] / 255), 255], 4 * k);
      }
      patchwork.getContext("2d").putImageData(image, 0, 0);
      const canvas = cards[i].querySelector("canvas:last-child"), context = canvas.getContext("2d");
      canvas.width = canvas.height = side;
      context.drawImage(grey, 0, 0);
      Object.assign(context, {globalAlpha: 0.65, imageSmoothingEnabled: false});
      context.drawImage(patchwork, 0, 0, side, side);
      context.globalAlpha = 1;
      outline(context, picture, side);
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
    mark();
    return draw(name);
  };

  const open = (index) => {
    sheet = sheets[index];
    maps = bytes(sheet.maps);
    const table = make("table"), high = sheet.layers > 12 ? " tall" : "";
    part("grid").className = `grid${high}`;
    part("grid").style.setProperty("--heads", sheet.heads);
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
        button.append(make("span"));
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
    const plain = part("pictures").querySelectorAll("canvas:first-child");
    greys = sheet.pictures.map((picture, i) => prepare(picture, plain[i]));
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
  new ResizeObserver(distribute).observe(part("layers"));
}
