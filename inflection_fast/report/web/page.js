// Draws the page with uPlot, from the manifest and the arrays in the page (of a live run: from its server). Text from
// outside is set as textContent; the HTML fragments are escaped by the writer of the page.
"use strict";
(() => {

const $ = (id) => document.getElementById(id);
let manifest = JSON.parse($("manifest").textContent);
const LIVE = manifest.live;
const POLL_MS = 2000;
const STATISTICS = ["mean", "lowest", "highest"];
const TABLE_COLUMNS = 12, TABLE_ROWS = 40;  // of a table below a chart; the CSV holds everything
const LOG_RATIO = 50;  // positive values whose ratio is larger start with a log scale

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

const span = (text, name = null) => make("span", { text, class: name });
const range = (count) => [...Array(count).keys()];

function dot(colour) {
  const element = make("b", { text: "\u25cf ", "aria-hidden": true });
  element.style.color = colour;
  return element;
}

// ---- numbers ----------------------------------------------------------------------------------------------------------

function format(number, digits = 3) {
  if (number === null || number === undefined || Number.isNaN(number)) return "no value";
  if (!Number.isFinite(number)) return String(number);
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size < 1e-3 || size >= 1e5) return number.toExponential(digits - 1);
  return number.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
}

const whole = (number) => number.toLocaleString("en-US");
const missingToNull = (row) => Array.from(row, (value) => (Number.isNaN(value) ? null : value));
const stepText = ([first, last]) => (first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}`);

function extent(values, counts = Number.isFinite) {  // lowest and highest; Infinity, -Infinity without values
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (!counts(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// ---- arrays: zlib of the byte planes of float32, see packing.py -------------------------------------------------------

let arrays = new Map();

async function packed(id) {
  if (LIVE) {
    const answer = await fetch(`array?id=${id}&version=${manifest.version}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`array ${id}: ${answer.status}`);
    return answer.blob();
  }
  const text = atob($(`array-${id}`).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes]);
}

async function unpack(id) {
  const stream = (await packed(id)).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = planes.length / 4, bits = new Uint32Array(count);
  for (let i = 0; i < count; i++) {
    bits[i] = planes[i] | (planes[count + i] << 8) | (planes[2 * count + i] << 16) | (planes[3 * count + i] << 24);
  }
  return new Float32Array(bits.buffer);
}

function array(reference) {
  if (!arrays.has(reference.id)) arrays.set(reference.id, unpack(reference.id));
  return arrays.get(reference.id);
}

// ---- colours ----------------------------------------------------------------------------------------------------------

const VIRIDIS = "440154 482173 433e85 38588c 2d708e 25858e 1e9b8a 2ab07f 52c569 86d549 c2df23 fde725".split(" ");
const DIVERGING = "0a4b78 2a72a5 5e9cc9 9cc5e2 d3e4ee f3f3f1 f6dcc6 efb98a dd8c4b bd6120 8a3f08".split(" ");

function ramp(anchors) {
  const colours = anchors.map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const table = new Uint32Array(256);  // little-endian RGBA, as ImageData holds it
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (colours.length - 1), low = Math.min(Math.floor(place), colours.length - 2);
    const [r, g, b] = colours[low].map((v, c) => Math.round(v + (place - low) * (colours[low + 1][c] - v)));
    table[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return table;
}

const RAMPS = { even: ramp(VIRIDIS), difference: ramp(DIVERGING) };
const gradient = (kind) =>
  `linear-gradient(90deg, ${(kind === "difference" ? DIVERGING : VIRIDIS).map((hex) => `#${hex}`).join(", ")})`;

function showColours(element, { low, high, kind }, unit) {  // the colour bar of a map
  element.replaceChildren();
  if (low > high) return;
  const bar = make("i", { "aria-hidden": true });
  bar.style.background = gradient(kind);
  element.append(format(low), bar, `${format(high)}${unit}`);
}

let palette = {};

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  palette = Object.fromEntries(
    ["ink", "soft", "faint", "line", "accent", "band", "chosen", "alert", "second", "third", "hatch", "hatch-paper", "card"]
      .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function hatching(context) {
  const tile = document.createElement("canvas"), side = Math.round(7 * devicePixelRatio);
  tile.width = tile.height = side;
  const pen = tile.getContext("2d");
  pen.fillStyle = palette["hatch-paper"];
  pen.fillRect(0, 0, side, side);
  pen.strokeStyle = palette.hatch;
  pen.lineWidth = devicePixelRatio;
  for (const shift of [-side, 0, side]) {
    pen.beginPath();
    pen.moveTo(shift, side);
    pen.lineTo(shift + side, 0);
    pen.stroke();
  }
  return context.createPattern(tile, "repeat");
}

// ---- charts: what they share ------------------------------------------------------------------------------------------

const charts = new Set();  // { plot: uPlot, box: element, height(width) }
const FONT = '11.5px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif';
let shownSteps = null;  // [low, high] of all charts over steps while they are zoomed
let zoomedByHand = false;

function axis(options) {
  return {
    font: FONT, stroke: () => palette.soft, gap: 4, size: 34,
    ticks: { stroke: () => palette.line, size: 4, width: 1 },
    grid: { stroke: () => palette.line, width: 1 },
    ...options,
  };
}

const FIXED = { auto: false, range: (_, low, high) => [low, high] };
const FIXED_X = { ...FIXED, time: false };
const stepAxis = () => axis({ values: integerTicks, grid: { show: false }, size: 26, space: 60 });
const linear = { range: (_, low, high) => (low === null ? [0, 1] : roomy(low, high)) };

function numberAxis(log = false) {
  return axis({
    values: numberTicks, size: (_, values) => wide(values), space: 32,
    ...(log ? { splits: (plot) => logSplits(plot.scales.y.min, plot.scales.y.max) } : {}),
  });
}

const numberTicks = (_, ticks) => ticks.map((tick) => (tick === null ? "" : compact(tick)));
const integerTicks = (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? whole(tick) : ""));

function compact(number) {
  if (number === 0) return "0";
  const size = Math.abs(number);
  if (size >= 1e4 || size < 1e-3) return number.toExponential(0).replace("e+", "e");
  return String(+number.toPrecision(4));
}

function wide(values) {  // width of an axis that fits its labels
  const longest = (values || []).reduce((most, value) => Math.max(most, String(value).length), 0);
  return 12 + 7 * Math.max(longest, 2);
}

function stepEdges(steps, length) {
  // Borders of the columns of a map, with a gap where measured steps are missing.
  const gaps = steps.slice(1).map((pair, i) => (pair[0] - steps[i][0]) / length).sort((a, b) => a - b);
  const gap = gaps.length ? gaps[Math.floor(gaps.length / 2)] : 1;
  const left = steps.map(([first]) => first - gap / 2), right = steps.map(([, last]) => last + gap / 2);
  for (let i = 1; i < steps.length; i++) {
    if (steps[i][0] - steps[i - 1][1] <= 1.5 * gap) left[i] = right[i - 1] = (steps[i][0] + steps[i - 1][1]) / 2;
  }
  return { left, right, gap };
}

function allSteps() {
  const [low, high] = extent(manifest.columns.flatMap(({ steps, length }) => {
    const { left, right } = stepEdges(steps, length);
    return [left[0], right.at(-1)];
  }));
  return low < high ? [low, high] : [0, 1];
}

function zoomSteps(range) {
  zoomedByHand = range !== null;
  shownSteps = range ?? allSteps();
  for (const chart of charts) {
    if (chart.overSteps) chart.plot.setScale("x", { min: shownSteps[0], max: shownSteps[1] });
  }
}

function draw(box, options, data, { height, overSteps = false, reset = () => {} }) {
  const entry = { box, overSteps, height, reset };
  const dragged = (plot) => {
    const { left, width, top, height: tall } = plot.select;
    if (width > 4 || tall > 4) {
      const wanted = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
      if (options.zoomY && tall > 4) plot.setScale("y", { min: plot.posToVal(top + tall, "y"), max: plot.posToVal(top, "y") });
      if (width > 4) overSteps ? zoomSteps(wanted) : plot.setScale("x", { min: wanted[0], max: wanted[1] });
      entry.dragged = true;
    }
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  };
  const full = {
    width: Math.max(box.clientWidth, 120), height: height(Math.max(box.clientWidth, 120)),
    legend: { show: false }, padding: [8, 10, 0, 0], ...options,
    cursor: {
      y: Boolean(options.zoomY), drag: { x: true, y: Boolean(options.zoomY), setScale: false, uni: 12 }, points: { show: false }, ...options.cursor,
      sync: options.group ? {
        key: options.group, scales: ["x", null], setSeries: false,
        filters: { sub: (type) => type !== "mousedown" && type !== "mouseup" },
      } : undefined,
      bind: { dblclick: () => () => { entry.reset(); overSteps ? zoomSteps(null) : null; return null; } },
    },
    hooks: { ...options.hooks, setSelect: [dragged] },
  };
  entry.plot = new uPlot(full, data, box);
  entry.observer = new ResizeObserver(() => {
    const width = box.clientWidth;
    if (width > 0 && width !== entry.plot.width) entry.plot.setSize({ width, height: height(width) });
  });
  entry.observer.observe(box);
  charts.add(entry);
  if (overSteps) entry.plot.setScale("x", { min: shownSteps[0], max: shownSteps[1] });
  return entry;
}

function erase(entry) {
  entry.observer.disconnect();
  entry.plot.destroy();
  charts.delete(entry);
}

function marker(context, x, y, size, colour, shape) {
  context.fillStyle = colour;
  context.beginPath();
  if (shape === "down") {
    context.moveTo(x - size, y - size); context.lineTo(x + size, y - size); context.lineTo(x, y + size * .7);
  } else if (shape === "left") {
    context.moveTo(x + size, y - size); context.lineTo(x + size, y + size); context.lineTo(x - size * .7, y);
  } else context.arc(x, y, size, 0, 2 * Math.PI);
  context.closePath();
  context.fill();
}

// ---- a table below every chart ---------------------------------------------------------------------------------------

function tableBelow(title, rowsOf) {
  // rowsOf(all) -> { head, rows, note }; all: everything, for the CSV
  const details = make("details", {}, make("summary", { text: "Table" }));
  details.addEventListener("toggle", async () => {
    if (!details.open) return;
    details.querySelector("div")?.remove();
    const { head, rows, note } = await rowsOf(false);
    const table = make("table", {}, make("caption", { text: note ? `${title}. ${note}` : title }));
    table.append(make("thead", {}, make("tr", {}, ...head.map((text, i) => make("th", { text, scope: "col", class: i ? "n" : null })))));
    table.append(make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, i) =>
      make("td", { text: typeof cell === "number" || cell === null ? format(cell) : cell, class: i ? "n" : null }))))));
    const save = make("button", { type: "button", class: "csv", text: "Save all as CSV", onclick: async () => {
      const all = await rowsOf(true);
      const quoted = (cell) => (cell === null || Number.isNaN(cell) ? "" : `"${String(cell).replaceAll('"', '""')}"`);
      const text = [all.head, ...all.rows].map((row) => row.map(quoted).join(",")).join("\r\n");
      const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `${title.replace(/[^\w-]+/g, "_")}.csv` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    } });
    details.append(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, save, table));
  });
  return details;
}

// Indices of a table of `count` rows or columns, and a note if not all are there.
function selected(count, most, what, all) {
  if (all || count <= most) return { kept: range(count), note: "" };
  const kept = range(most).map((i) => Math.round((i * (count - 1)) / (most - 1)));
  return { kept, note: `${most} of ${whole(count)} ${what}` };
}

// ---- lines over steps -------------------------------------------------------------------------------------------------

function withGaps(steps, length, rows) {
  // x and rows, with a null where measured steps are missing, so that lines have a gap there
  const { gap } = stepEdges(steps, length);
  const x = [], out = rows.map(() => []), from = [];
  steps.forEach(([first, last], i) => {
    if (i && first - steps[i - 1][1] > 1.5 * gap) {
      x.push((first + steps[i - 1][1]) / 2);
      out.forEach((row) => row.push(null));
      from.push(-1);
    }
    x.push((first + last) / 2);
    out.forEach((row, r) => row.push(Number.isNaN(rows[r][i]) ? null : rows[r][i]));
    from.push(i);
  });
  return { data: [x, ...out], from };
}

function lineChart(box, { steps, length, rows, log = false, height, alerts = [], readout, dots }) {
  // rows: [line] or [line, low, high]
  const { data, from } = withGaps(steps, length, rows);
  const positive = log && rows.every((row) => row.every((value) => Number.isNaN(value) || value > 0));
  const entry = draw(box, {
    group: "steps",
    scales: {
      x: FIXED_X,
      y: positive ? { distr: 3, range: (_, low, high) => (low === null ? [1, 10] : [low / 1.15, high * 1.15]) } : linear,
    },
    axes: [stepAxis(), numberAxis(positive)],
    series: [
      {},
      { stroke: () => palette.accent, width: 1.75, points: { show: dots ?? data[0].length < 2, size: 5, fill: () => palette.accent } },
      ...(rows.length > 1 ? [1, 2].map(() => ({ stroke: "transparent", width: 0, points: { show: data[0].length < 2 } })) : []),
    ],
    bands: rows.length > 1 ? [{ series: [3, 2], fill: () => palette.band }] : [],
    hooks: {
      setCursor: [({ cursor: { idx } }) => { const index = from[idx ?? -1] ?? -1; readout?.(index < 0 ? null : index); }],
      draw: [(plot) => {
        for (const step of new Set(entry ? entry.alerts : alerts.map((alert) => alert.step))) {
          const x = plot.valToPos(step, "x", true);
          if (x >= plot.bbox.left && x <= plot.bbox.left + plot.bbox.width) {
            marker(plot.ctx, x, plot.bbox.top + 2 * devicePixelRatio, 3.5 * devicePixelRatio, palette.alert, "down");
          }
        }
      }],
    },
  }, data, { height, overSteps: true });
  entry.alerts = alerts.map((alert) => alert.step);
  return entry;
}

function roomy(low, high) {
  const room = 0.08 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - room, high + room];
}

function logSplits(low, high) {  // powers of ten; of a range that holds less than two of them 1, 2 and 5 of each
  const decades = Math.log10(high / low), splits = [];
  const factors = decades < 2 ? [1, 2, 5] : [1], stride = Math.max(1, Math.ceil(decades / 4));
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    if (power % stride) continue;
    splits.push(...factors.map((factor) => factor * 10 ** power).filter((tick) => tick >= low && tick <= high));
  }
  return splits;
}

// ---- heat maps --------------------------------------------------------------------------------------------------------

class HeatMap {
  // rows x columns of numbers; columns have borders (left, right) on the x axis, row r fills r - 1/2 to r + 1/2
  constructor(box, options) {
    Object.assign(this, { log: false, kind: "even", chosen: [], alerts: [], rowName: "layer", columnName: null, group: "steps" }, options, { box });
    this.image = document.createElement("canvas");
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "application");
    this.box.setAttribute("aria-label", this.label);
    this.at = null;
    const map = this;
    this.entry = draw(box, {
      group: this.group, zoomY: true,
      scales: { x: FIXED_X, y: FIXED },
      axes: [
        axis({
          values: integerTicks, grid: { show: false }, size: 28, space: this.columnName ? 26 : 60,
          ...(this.columnName ? { label: this.columnName, labelSize: 18, labelFont: FONT, labelGap: 0, incrs: [1, 2, 4, 5, 10, 20, 50] } : {}),
        }),
        axis({
          values: integerTicks, grid: { show: false }, size: (_, values) => wide(values) + 4, space: 18,
          label: this.rowName, labelSize: 16, labelFont: FONT, labelGap: 0, incrs: [1, 2, 4, 8, 10, 16, 20, 32, 50, 64, 100],
        }),
      ],
      padding: [8, 22, 0, 0],
      series: [{}, { show: false }],
      hooks: { drawClear: [(plot) => map.paint(plot)], draw: [(plot) => map.marks(plot)], setCursor: [(plot) => map.pointed(plot)] },
    }, [[0, 1], [0, 1]], { height: this.height, overSteps: this.group === "steps", reset: () => this.seeAll() });
    this.listen();
    this.setData(options);
    this.seeAll();
  }

  seeAll() {
    this.entry.plot.setScale("y", { min: -0.5, max: this.rows - 0.5 });
    if (this.group !== "steps") this.entry.plot.setScale("x", { min: this.left[0], max: this.right.at(-1) });
  }

  setData(data) {
    Object.assign(this, data);
    this.columns = this.left.length;
    let [low, high] = extent(this.range ?? this.values, (value) => Number.isFinite(value) && (!this.log || value > 0));
    if (this.kind === "difference" && low <= high) { high = Math.max(Math.abs(low), Math.abs(high)) || 1; low = -high; }
    this.low = low; this.high = high;
    const scale = this.log ? Math.log : (value) => value;
    const bottom = scale(low), height = scale(high) - bottom;
    const pixels = new Uint32Array(this.rows * this.columns), table = RAMPS[this.kind];
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) {
        const value = this.values[row * this.columns + column];
        if (!Number.isFinite(value) || (this.log && value <= 0)) continue;  // stays clear: the hatching shows
        const share = height > 0 ? (scale(value) - bottom) / height : 0.5;
        pixels[(this.rows - 1 - row) * this.columns + column] = table[Math.max(0, Math.min(255, Math.round(255 * share)))];
      }
    }
    this.image.width = this.columns;
    this.image.height = this.rows;
    this.image.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), this.columns, this.rows), 0, 0);
    this.entry.plot.redraw(false);
  }

  paint(plot) {
    if (!this.columns) return;
    const pen = plot.ctx, { left, top, width, height } = plot.bbox;
    pen.save();
    pen.beginPath();
    pen.rect(left, top, width, height);
    pen.clip();
    pen.fillStyle = hatching(pen);
    pen.fillRect(left, top, width, height);
    pen.imageSmoothingEnabled = false;
    const upper = plot.valToPos(this.rows - 0.5, "y", true), lower = plot.valToPos(-0.5, "y", true);
    const { min, max } = plot.scales.x;
    for (let column = 0; column < this.columns; column++) {
      if (this.right[column] < min || this.left[column] > max) continue;
      const from = Math.round(plot.valToPos(this.left[column], "x", true)), to = Math.round(plot.valToPos(this.right[column], "x", true));
      pen.drawImage(this.image, column, 0, 1, this.rows, from, upper, Math.max(1, to - from), lower - upper);
    }
    if (this.low > this.high) {
      pen.fillStyle = palette.soft;
      pen.font = `${13 * devicePixelRatio}px system-ui, sans-serif`;
      pen.textAlign = "center";
      pen.fillText("no values", left + width / 2, top + height / 2);
    }
    pen.restore();
  }

  marks(plot) {
    const { left, top, width, height } = plot.bbox, ratio = devicePixelRatio, pen = plot.ctx;
    for (const row of this.chosen) {
      const y = plot.valToPos(row, "y", true);
      if (y >= top && y <= top + height) marker(pen, left + width + 9 * ratio, y, 4.5 * ratio, palette.chosen, "left");
    }
    for (const { step, row } of this.alerts) {
      const x = plot.valToPos(step, "x", true), y = row === null ? top : plot.valToPos(row, "y", true);
      if (x < left || x > left + width || y < top || y > top + height) continue;
      pen.strokeStyle = palette.card;
      pen.lineWidth = 2.5 * ratio;
      pen.beginPath();
      pen.arc(x, y, 3.5 * ratio, 0, 2 * Math.PI);
      pen.stroke();
      marker(pen, x, y, 3.5 * ratio, palette.alert, "dot");
    }
  }

  cellUnder(plot) {
    const { left, top } = plot.cursor;
    if ((left ?? -1) < 0 || top < 0) return null;
    const x = plot.posToVal(left, "x"), row = Math.round(plot.posToVal(top, "y"));
    const column = this.left.findIndex((border, i) => x >= border && x < this.right[i]);
    return row < 0 || row >= this.rows ? null : { row, column };
  }

  pointed(plot) {
    if (!this.entry) return;
    const cell = this.cellUnder(plot);
    this.at = cell;
    this.frame?.remove();
    this.frame = null;
    if (cell && cell.column >= 0) this.outline(plot, cell);
    this.readout?.(cell);
  }

  outline(plot, { row, column }) {
    const [x0, x1] = [this.left[column], this.right[column]].map((x) => plot.valToPos(x, "x"));
    const [y0, y1] = [row + 0.5, row - 0.5].map((y) => plot.valToPos(y, "y"));
    this.frame = make("div", { class: "cell" });
    Object.assign(this.frame.style, { left: `${x0}px`, top: `${y0}px`, width: `${Math.max(3, x1 - x0)}px`, height: `${Math.max(3, y1 - y0)}px` });
    plot.over.append(this.frame);
  }

  goTo(row, column) {
    const plot = this.entry.plot, hold = (value, most) => Math.max(0, Math.min(most, value));
    row = hold(row, this.rows - 1);
    column = hold(column, this.columns - 1);
    const middle = (this.left[column] + this.right[column]) / 2, { x, y } = plot.scales;
    if (middle < x.min || middle > x.max) this.showX(middle, (x.max - x.min) / 2);
    if (row < y.min || row > y.max) plot.setScale("y", { min: row - (y.max - y.min) / 2, max: row + (y.max - y.min) / 2 });
    // After the change of scales, which uPlot makes in a microtask of its own.
    queueMicrotask(() => plot.setCursor({ left: plot.valToPos(middle, "x"), top: plot.valToPos(row, "y") }, true, true));
  }

  showX(middle, half) {
    const min = middle - half, max = middle + half;
    this.group === "steps" ? zoomSteps([min, max]) : this.entry.plot.setScale("x", { min, max });
  }

  zoom(factor) {
    const plot = this.entry.plot, at = this.at ?? { row: (this.rows - 1) / 2, column: Math.floor(this.columns / 2) };
    const middle = at.column >= 0 ? (this.left[at.column] + this.right[at.column]) / 2 : (plot.scales.x.min + plot.scales.x.max) / 2;
    this.showX(middle, ((plot.scales.x.max - plot.scales.x.min) / 2) * factor);
    if (at.column >= 0) queueMicrotask(() => this.goTo(at.row, at.column));
  }

  listen() {
    this.box.addEventListener("keydown", (event) => {
      const at = this.at?.column >= 0 ? this.at : { row: Math.floor(this.rows / 2), column: this.columns - 1 };
      const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [8, 0], PageDown: [-8, 0] }[event.key];
      if (move) this.at ? this.goTo(at.row + move[0], at.column + move[1]) : this.goTo(at.row, at.column);
      else if (event.key === "Home") this.goTo(at.row, 0);
      else if (event.key === "End") this.goTo(at.row, this.columns - 1);
      else if (event.key === "Enter" || event.key === " ") this.choose?.(at.row, at.column);
      else if (event.key === "+" || event.key === "=") this.zoom(0.5);
      else if (event.key === "-") this.zoom(2);
      else if (event.key === "0") { this.seeAll(); if (this.group === "steps") zoomSteps(null); }
      else return;
      event.preventDefault();
    });
    this.entry.plot.over.addEventListener("click", () => {
      if (this.entry.dragged) { this.entry.dragged = false; return; }
      if (this.at) this.choose?.(this.at.row, this.at.column);
    });
  }

  remove() {
    erase(this.entry);
    this.box.replaceChildren();
  }
}

// ---- overview ---------------------------------------------------------------------------------------------------------

const drawn = new Map();  // id -> { update(column) }

const alertsOf = (name) => manifest.alerts.filter((alert) => alert.signal === name);

// A small chart with its caption and its table; `label` is read by a screen reader.
function figure(parent, name, unit, { title = null, label = null, tableName, table }) {
  const value = make("span", { class: "value" }), box = make("div", { class: "plot", role: "img", "aria-label": label });
  const element = make("figure", { class: "card multiple", title },
    make("figcaption", {}, name, span(unit, "unit"), value), box, tableBelow(tableName, table));
  parent.append(element);
  return { value, box, figure: element };
}

class Multiple {
  constructor(column) {
    const name = column.axes.length ? make("a", { href: `#map-${slug(column.name)}`, text: column.label }) : span(column.label);
    Object.assign(this, figure($("multiples"), name, column.unit, {
      title: column.explanation, tableName: column.label, table: (all) => this.table(all),
    }));
  }

  async update(column) {
    const flat = await array(column.overall), count = column.steps.length;
    this.column = column;
    this.rows = [0, 1, 2].map((i) => flat.subarray(i * count, (i + 1) * count));
    const single = this.rows[1].every((value, i) => Object.is(value, this.rows[2][i]) && Object.is(value, this.rows[0][i]));
    if (this.entry) erase(this.entry);
    this.entry = lineChart(this.box, {
      steps: column.steps, length: column.length, rows: single ? [this.rows[0]] : this.rows, log: column.log || needsLog(flat),
      height: () => 128, alerts: alertsOf(column.name), readout: (index) => this.say(index),
    });
    this.box.setAttribute("aria-label", `${column.label}, ${column.unit}: ${this.words(count - 1)}. The table below holds the numbers.`);
    this.say(null);
  }

  words(index) {
    const [mean, low, high] = this.rows.map((row) => row[index]);
    const range = Object.is(low, high) ? "" : ` (${format(low)} to ${format(high)})`;
    return `${stepText(this.column.steps[index])}: ${format(mean)}${range}`;
  }

  say(index) {
    this.value.textContent = this.words(index ?? this.column.steps.length - 1);
  }

  table(all) {
    const { steps } = this.column, { kept, note } = selected(steps.length, TABLE_ROWS, "rows", all);
    return { head: ["step", ...STATISTICS], rows: kept.map((i) => [stepText(steps[i]), ...this.rows.map((row) => row[i])]), note };
  }
}

function needsLog(values) {
  const [low, high] = extent(values);
  return low > 0 && high / low > LOG_RATIO;
}

const slug = (name) => name.replace(/[^\w-]/g, (c) => `_${c.codePointAt(0).toString(16)}_`);

function output() {
  return make("output", { class: "readout", "aria-live": "polite" });
}

// A map with its title, readout, colour bar and table; `head` and `below` are further elements.
function mapCard(parent, title, unit, table, { id = null, about = [], head = [], below = [] } = {}) {
  const box = make("div", { class: "plot" }), readout = output(), scale = span("", "scale");
  const heading = make("h3", {}, `${title} `, span(unit, "unit"));
  const article = make("article", { class: "card map", id },
    make("div", { class: "head" }, about.length ? make("div", {}, heading, ...about) : heading, ...head),
    box, make("div", { class: "under" }, readout, scale), ...below, tableBelow(title, table));
  parent.append(article);
  return { box, readout, scale, article };
}

const mapHeight = (rows, cell = 17, least = 150) => Math.max(least, Math.min(430, cell * rows)) + 40;

// ---- a card for every column by layer ---------------------------------------------------------------------------------

class Card {
  constructor(column) {
    this.statistic = 0;
    this.log = null;
    this.controls = make("div", { class: "controls" });
    this.detail = make("div", { class: "detail", hidden: true });
    this.note = make("p", { class: "note" });
    Object.assign(this, mapCard($("cards"), column.label, column.unit, (all) => this.table(all), {
      id: `map-${slug(column.name)}`, about: [make("p", { text: column.explanation })], head: [this.controls], below: [this.note, this.detail],
    }));
  }

  async update(column) {
    this.column = column;
    this.values = await array(column.map);
    this.statistics = column.map.shape[0];
    this.layers = column.map.shape[1];
    this.several = this.statistics === 3;
    this.positive = this.shown().every((value) => !(value <= 0));
    if (this.log === null) this.log = this.positive && (column.log || needsLog(this.shown()));
    this.buildControls();
    const { left, right } = stepEdges(column.steps, column.length);
    const data = {
      rows: this.layers, left, right, values: this.shown(), log: this.log, chosen: manifest.plan?.layers ?? [],
      alerts: alertsOf(column.name).map(({ step, layer }) => ({ step, row: layer })),
    };
    if (this.map) this.map.setData(data);
    else {
      this.map = new HeatMap(this.box, {
        ...data, height: () => mapHeight(this.layers),
        label: `${column.label} by layer and step. Arrow keys move, Enter shows ${column.parts ? "the heads" : "the course"} of a layer, plus and minus zoom, 0 shows all.`,
        readout: (cell) => this.say(cell), choose: (row) => this.open(row),
      });
    }
    this.legend();
    this.say(null);
    this.note.textContent = this.aboutColumns();
    this.note.hidden = !this.note.textContent;
    if (!this.detail.hidden) await this.open(this.layer, false);
  }

  aboutColumns() {
    const { length, parts } = this.column;
    const over = parts ? `${parts.axis}s` : "";
    const colour = `the colour is their ${STATISTICS[this.statistic]} value`;
    if (length > 1) return `Each column has ${whole(length)} measured steps${over ? ` and all ${over}` : ""}: ${colour}; the line below the map shows mean, lowest and highest.`;
    return this.several && over ? `Each cell has all ${over} of a layer: ${colour}.` : "";
  }

  shown() {
    const size = this.layers * this.column.steps.length;
    return this.values.subarray(this.statistic * size, (this.statistic + 1) * size);
  }

  buildControls() {
    this.controls.replaceChildren();
    if (this.several) {
      const name = `statistic-${slug(this.column.name)}`;
      this.controls.append(make("span", { class: "segments", role: "radiogroup", "aria-label": "Colour shows" },
        ...STATISTICS.map((text, i) => make("label", {}, make("input", {
          type: "radio", name, checked: i === this.statistic, onchange: () => { this.statistic = i; this.recolour(); },
        }), text))));
    }
    if (this.positive) {
      this.controls.append(make("label", {}, make("input", {
        type: "checkbox", checked: this.log, onchange: (event) => { this.log = event.target.checked; this.recolour(); },
      }), "log scale"));
    }
    this.controls.append(make("button", { type: "button", text: "See all", onclick: () => { this.map.seeAll(); zoomSteps(null); } }));
  }

  recolour() {
    this.map.setData({ values: this.shown(), log: this.log });
    this.legend();
    this.note.textContent = this.aboutColumns();
    if (!this.detail.hidden) this.open(this.layer, false);
  }

  legend() {
    showColours(this.scale, this.map, ` ${this.column.unit}${this.log ? ", log" : ""}`);
  }

  at(statistic, layer, column) {
    const count = this.column.steps.length;
    return this.values[Math.min(statistic, this.statistics - 1) * this.layers * count + layer * count + column];
  }

  say(cell) {
    if (!cell) { this.readout.textContent = ""; return; }
    const name = `layer ${cell.row}`;
    if (cell.column < 0) { this.readout.textContent = `${name}: nothing was measured there`; return; }
    const mean = this.at(0, cell.row, cell.column);
    const range = this.several && !Number.isNaN(mean)
      ? ` (lowest ${format(this.at(1, cell.row, cell.column))}, highest ${format(this.at(2, cell.row, cell.column))})` : "";
    this.readout.textContent = `${name}, ${stepText(this.column.steps[cell.column])}: ${format(mean)}${range}`;
  }

  table(all) {
    const { steps } = this.column, { kept, note } = selected(steps.length, TABLE_COLUMNS, "columns", all);
    const named = STATISTICS.slice(0, all ? this.statistics : 1);
    return {
      head: ["layer", ...named.flatMap((name) => kept.map((i) => (this.several ? `${name}, ` : "") + stepText(steps[i])))],
      rows: range(this.layers).map((layer) => [
        String(layer), ...named.flatMap((_, s) => kept.map((i) => this.at(s, layer, i)))]),
      note,
    };
  }

  async open(layer, scroll = true) {
    this.layer = layer;
    this.inside?.remove();
    this.inside = null;
    const { column } = this, name = manifest.layers[layer] ?? "";
    const what = column.parts ? `${column.parts.axis}s` : "course";
    const box = make("div", { class: "plot" }), readout = output();
    const close = make("button", { type: "button", text: "Close", onclick: () => this.close() });
    this.detail.replaceChildren(
      make("div", { class: "head" }, make("h3", {}, `Layer ${layer}, ${what} `, span(name, "unit")), close),
      box, make("div", { class: "under" }, readout));
    this.detail.hidden = false;
    if (column.parts) await this.openHeads(layer, box, readout);
    else await this.openCourse(layer, box, readout);
    if (scroll) { close.focus({ preventScroll: true }); this.detail.scrollIntoView({ block: "nearest" }); }
  }

  async openHeads(layer, box, readout) {
    const { parts, label } = this.column, { axis: part } = parts, [statistics, , heads, count] = parts.shape;
    const all = await array(parts);
    const cell = (s, head, i) => all[((Math.min(s, statistics - 1) * this.layers + layer) * heads + head) * count + i];
    const values = Float32Array.from({ length: heads * count }, (_, k) => cell(this.statistic, Math.floor(k / count), k % count));
    this.inside = new HeatMap(box, {
      rows: heads, ...stepEdges(parts.steps, parts.length), values, log: this.log, range: this.headRange(), rowName: part,
      label: `${label}: ${part}s of layer ${layer} by step.`, height: () => mapHeight(heads, 15, 120),
      alerts: alertsOf(this.column.name).filter((alert) => alert.layer === layer && alert.head !== null).map(({ step, head }) => ({ step, row: head })),
      readout: (at) => {
        readout.textContent = !at ? "" : at.column < 0 ? `${part} ${at.row}: nothing was measured there`
          : `${part} ${at.row}, ${stepText(parts.steps[at.column])}: ${format(cell(0, at.row, at.column))}`
            + (statistics === 3 ? ` (lowest ${format(cell(1, at.row, at.column))}, highest ${format(cell(2, at.row, at.column))})` : "");
      },
    });
  }

  headRange() {  // of all layers, so that the colours of two layers compare
    const size = this.layers * this.column.steps.length;
    return this.several ? this.values.subarray(size, 3 * size) : this.values;
  }

  async openCourse(layer, box, readout) {
    const { column } = this, count = column.steps.length;
    const row = (s) => Float32Array.from({ length: count }, (_, i) => this.at(s, layer, i));
    const errors = manifest.columns.find((other) => other.name === column.error);
    let rows = this.several ? [row(0), row(1), row(2)] : [row(0)], band = this.several ? "lowest to highest" : "";
    if (errors && !this.several && String(errors.steps) === String(column.steps)) {
      const error = (await array(errors.map)).subarray(layer * count, (layer + 1) * count);
      rows = [rows[0], rows[0].map((value, i) => value - error[i]), rows[0].map((value, i) => value + error[i])];
      band = "one standard error to each side";
    }
    const entry = lineChart(box, {
      steps: column.steps, length: column.length, rows, log: this.log, height: () => 190, dots: count < 60,
      alerts: alertsOf(column.name).filter((alert) => alert.layer === layer),
      readout: (i) => {
        readout.textContent = i === null ? (band ? `Band: ${band}.` : "")
          : `${stepText(column.steps[i])}: ${format(rows[0][i])}${rows[1] ? ` (${format(rows[1][i])} to ${format(rows[2][i])}, ${band})` : ""}`;
      },
    });
    readout.textContent = band ? `Band: ${band}.` : "";
    this.inside = { remove: () => erase(entry) };
  }

  close() {
    this.inside?.remove();
    this.inside = null;
    this.detail.hidden = true;
    this.box.focus({ preventScroll: true });
  }
}

// ---- alerts -----------------------------------------------------------------------------------------------------------

let alertEntry = null;

function drawAlerts() {
  const box = $("alert-chart");
  if (alertEntry) erase(alertEntry);
  alertEntry = null;
  box.replaceChildren();
  if (!manifest.alerts.length || !manifest.columns.length) return;
  const kinds = [...new Set(manifest.alerts.map((alert) => alert.kind))];
  const ordered = [...manifest.alerts].sort((a, b) => a.step - b.step);
  const plot = make("div", { class: "plot", role: "img", "aria-label": `${manifest.alerts.length} alerts by kind and step; the table below lists them.` });
  const readout = make("output", { class: "readout" });
  box.append(make("div", { class: "card" }, plot, make("div", { class: "under" }, readout)));
  alertEntry = draw(plot, {
    group: "steps",
    scales: { x: FIXED_X, y: { range: () => [kinds.length - 0.4, -0.6] } },
    axes: [
      stepAxis(),
      axis({
        splits: () => kinds.map((_, i) => i), values: () => kinds.map((kind) => kind.replaceAll("_", " ")),
        size: () => 14 + 6.4 * Math.max(...kinds.map((kind) => kind.length)),
      }),
    ],
    series: [{}, ...kinds.map(() => ({ paths: () => null, stroke: () => palette.alert, points: { show: true, size: 9, fill: () => palette.alert, stroke: () => palette.card, width: 1.5 } }))],
    hooks: { setCursor: [({ cursor: { idx } }) => { readout.textContent = ordered[idx ?? -1]?.message ?? ""; }] },
  }, [ordered.map((alert) => alert.step), ...kinds.map((kind, i) => ordered.map((alert) => (alert.kind === kind ? i : null)))],
    { height: () => 34 + 34 * kinds.length, overSteps: true });
}

// ---- chosen layers ----------------------------------------------------------------------------------------------------

let choiceEntries = [];

function drawChoice(again = true) {
  if (again) {
    choiceEntries.forEach(erase);
    choiceEntries = [];
  }
  $("choice-charts").replaceChildren();
  const { plan } = manifest;
  if (!plan) return;
  const found = (name) => plan.found[name]?.map((layer) => ({ layer, name })) ?? [];
  byLayer("SKI", "0 to 1", [{ name: "SKI", values: plan.scores }], plan.layers);
  byLayer("Components of SKI", "0 to 1", Object.entries(plan.components).map(([name, values]) => ({ name, values })), []);
  const [entropy, gradient] = plan.profile;
  byLayer(entropy.label, entropy.unit, [{ name: entropy.label, ...entropy }], plan.layers, found("entropy minimum"));
  byLayer(gradient.label, gradient.unit, [{ name: gradient.label, ...gradient }], plan.layers, found("gradient cliff"));
}

const LINES = ["accent", "second", "third", "faint"];

function byLayer(title, unit, lines, chosen, rings = [], { into = $("choice-charts"), log = false, explanation = null, mark = "chosen" } = {}) {
  if (lines.every(({ values }) => values.every((value) => value === null))) return;
  const count = Math.max(...lines.map(({ values }) => values.length)), colours = LINES;
  const { value, box } = figure(into, span(title), unit, {
    title: explanation, label: `${title} by layer; the table holds the numbers.`, tableName: `${title} by layer`,
    table: () => ({
      head: ["layer", ...lines.flatMap(({ name, error }) => (error ? [name, "standard error"] : [name]))],
      rows: range(count).map((i) => [String(i), ...lines.flatMap(({ values, error }) => (error ? [values, error] : [values]).map((row) => row[i] ?? null))]),
    }),
  });
  const say = (i) => {
    if (i === null && lines.length > 1) {
      const names = lines.map(({ name }, k) => [name, colours[k]]);
      if (chosen.length) names.push([`${mark} layers`, "chosen"]);
      value.replaceChildren(...names.flatMap(([name, colour]) => [make("span", { class: "entry" }, dot(`var(--${colour})`), name), " "]));
      return;
    }
    const said = i === null ? [chosen.length ? `Orange: ${mark} layers.` : "", ...rings.map(({ name, layer }) => `Ring: ${name}, layer ${layer}.`)].join(" ")
      : `layer ${i}: ${lines.map(({ name, values, error }) => (lines.length > 1 ? `${name} ` : "") + format(values[i]) + (error && (error[i] ?? null) !== null && values[i] !== null ? ` ± ${format(error[i], 2)}` : "")).join(", ")}${chosen.includes(i) ? `, ${mark}` : ""}`;
    value.textContent = said;
  };
  const reach = lines.flatMap(({ values, error }) => values.flatMap((v, i) => (v === null ? [] : [v - (error?.[i] ?? 0), v + (error?.[i] ?? 0)])));
  const known = lines.flatMap(({ values }) => values.filter((v) => v !== null));
  const positive = log && known.every((v) => v > 0);
  const bottom = Math.min(...reach), top = Math.max(...reach), room = 0.1 * (top - bottom) || Math.abs(top) * 0.1 || 1;
  const least = bottom >= 0 && known.every((v) => v >= 0) ? Math.max(0, bottom - room) : bottom - room;  // counts are not below 0
  const low = Math.min(...known), high = Math.max(...known);
  choiceEntries.push(draw(box, {
    group: "layers",
    scales: { x: FIXED_X, y: positive ? { distr: 3, range: () => [low / 1.3, high * 1.3] } : { range: () => [least, top + room] } },
    axes: [
      axis({ values: integerTicks, grid: { show: false }, size: 26, space: 26, incrs: [1, 2, 4, 5, 10, 20, 50] }),
      numberAxis(positive),
    ],
    series: [{}, ...lines.map((_, k) => ({
      stroke: () => palette[colours[k]], width: 1.75, points: { show: count <= 64, size: 5, fill: () => palette[colours[k]] },
    }))],
    hooks: {
      setCursor: [({ cursor: { idx } }) => say(idx ?? null)],
      draw: [(plot) => {
        const pen = plot.ctx, ratio = devicePixelRatio, place = (i, v) => [plot.valToPos(i, "x", true), plot.valToPos(v, "y", true)];
        pen.lineWidth = 1.25 * ratio;
        for (const [k, { values, error }] of lines.entries()) {
          pen.strokeStyle = palette[colours[k]];
          error?.forEach((e, i) => {
            if (e === null || values[i] === null || (positive && values[i] - e <= 0)) return;
            const [x, low] = place(i, values[i] - e), [, high] = place(i, values[i] + e);
            pen.beginPath();
            pen.moveTo(x, low); pen.lineTo(x, high);
            pen.moveTo(x - 3 * ratio, low); pen.lineTo(x + 3 * ratio, low);
            pen.moveTo(x - 3 * ratio, high); pen.lineTo(x + 3 * ratio, high);
            pen.stroke();
          });
        }
        for (const i of chosen) {
          if (lines[0].values[i] !== null) marker(pen, ...place(i, lines[0].values[i]), 5 * ratio, palette.chosen, "dot");
        }
        pen.strokeStyle = palette.ink;
        for (const { layer } of rings) {
          if (lines[0].values[layer] === null) continue;
          pen.beginPath();
          pen.arc(...place(layer, lines[0].values[layer]), 9 * ratio, 0, 2 * Math.PI);
          pen.stroke();
        }
      }],
    },
  }, [range(count), ...lines.map(({ values }) => range(count).map((i) => values[i] ?? null))], { height: () => (into.classList.contains("wide") ? 190 : 150) }));
  choiceEntries.at(-1).plot.setScale("x", { min: -0.5, max: count - 0.5 });
  say(null);
}

// ---- the whole page ---------------------------------------------------------------------------------------------------

const idle = (work) => ("requestIdleCallback" in window ? requestIdleCallback(work, { timeout: 500 }) : setTimeout(work, 30));

const near = (element) => element.getBoundingClientRect().top < innerHeight * 1.3;

function complete(version = 1) {
  performance.mark("complete");
  document.documentElement.dataset.complete = String(version);
}

// ---- layers against layers --------------------------------------------------------------------------------------------

class MatrixCard {
  constructor(matrix) {
    this.about = make("p", {});
    Object.assign(this, mapCard($("matrix-cards"), matrix.label, matrix.unit, () => this.table(), { about: [this.about] }));
  }

  async update(matrix) {
    const values = await array(matrix), [rows, columns] = matrix.shape;
    Object.assign(this, { matrix, values, rows, columns });
    this.about.textContent = matrix.explanation;
    const left = range(columns).map((i) => i - 0.5), right = left.map((border) => border + 1);
    const data = { rows, left, right, values, range: matrix.unitInterval ? [0, 1] : undefined };
    if (this.map) this.map.setData(data);
    else {
      this.map = new HeatMap(this.box, {
        ...data, group: "matrix", rowName: matrix.rows, columnName: matrix.columns,
        height: (width) => Math.max(170, Math.min(460, (width * rows) / columns)) + 30,
        label: `${matrix.label}: ${matrix.rows} by ${matrix.columns}. Arrow keys move.`, readout: (cell) => this.say(cell),
      });
    }
    showColours(this.scale, this.map, "");
  }

  say(cell) {
    this.readout.textContent = !cell || cell.column < 0 ? ""
      : `${this.matrix.rows} ${cell.row}, ${this.matrix.columns} ${cell.column}: ${format(this.values[cell.row * this.columns + cell.column])}`;
  }

  table() {
    return {
      head: [`${this.matrix.rows} \\ ${this.matrix.columns}`, ...range(this.columns).map(String)],
      rows: range(this.rows).map((row) => [String(row), ...this.values.subarray(row * this.columns, (row + 1) * this.columns)]),
      note: "",
    };
  }
}

const matrices = new Map();  // label -> MatrixCard

async function drawMatrices() {
  const wanted = manifest.matrices ?? [];
  for (const part of document.querySelectorAll('#matrices, nav a[href="#matrices"]')) part.hidden = !wanted.length;
  for (const matrix of wanted) {
    if (!matrices.has(matrix.label)) matrices.set(matrix.label, new MatrixCard(matrix));
    await matrices.get(matrix.label).update(matrix);
  }
}

async function drawLook() {
  shownSteps = [0, 1];
  for (const { label, unit, lines, marked, log, explanation } of manifest.profiles) {
    byLayer(label, unit, lines, marked, [], { into: $("multiples"), log, explanation, mark: "found" });
  }
  if (!manifest.profiles.length) $("overview").hidden = true;
  performance.mark("drawn");
  await drawMatrices();
  if (manifest.plan) drawChoice(false);
  else for (const part of document.querySelectorAll('#choice, nav a[href="#choice"]')) part.hidden = true;
  complete();
}

// ---- several runs ------------------------------------------------------------------------------------------------------

const LINE_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255"];
const lineColour = (group) => LINE_COLOURS[group % LINE_COLOURS.length];

class Overlay {  // a small multiple with a line for every group of runs
  constructor(column) {
    Object.assign(this, figure($("multiples"), span(column.label), column.unit, {
      title: column.explanation, tableName: column.label, table: (all) => this.table(all),
      label: `${column.label} of ${column.lines.length} groups of runs; the table below holds the numbers.`,
    }));
  }

  async update(column) {
    const numbers = await Promise.all(column.lines.map(array));
    const place = new Map(column.steps.map((pair, i) => [String(pair), i]));
    this.column = column;
    this.rows = column.lines.map((line, k) => [0, 1].map((part) => {
      const row = new Float32Array(column.steps.length).fill(NaN);
      line.steps.forEach((pair, i) => { row[place.get(String(pair))] = numbers[k][part * line.steps.length + i]; });
      return row;
    }));
    const data = [column.steps.map(([first, last]) => (first + last) / 2)], series = [{}], bands = [];
    column.lines.forEach((line, k) => {
      const [mean, half] = this.rows[k], colour = lineColour(line.group);
      data.push(missingToNull(mean));
      series.push({ stroke: colour, width: 1.75, spanGaps: true, points: { show: line.steps.length < 2, size: 6, fill: colour } });
      if (line.runs < 2) return;
      data.push(...[1, -1].map((sign) => missingToNull(mean.map((value, i) => value + sign * half[i]))));
      series.push(...[1, -1].map(() => ({ stroke: "transparent", width: 0, spanGaps: true, points: { show: false } })));
      bands.push({ series: [series.length - 2, series.length - 1], fill: `${colour}2e` });
    });
    draw(this.box, {
      group: "steps", series, bands,
      scales: { x: FIXED_X, y: linear },
      axes: [stepAxis(), numberAxis()],
      hooks: { setCursor: [({ cursor: { idx } }) => this.say(idx ?? null)] },
    }, data, { height: () => 170, overSteps: true });
    this.say(null);
  }

  say(index) {
    const i = index ?? this.column.steps.length - 1;
    this.value.replaceChildren(`${stepText(this.column.steps[i])}: `, ...this.column.lines.map((line, k) => {
      const [mean, half] = this.rows[k].map((row) => row[i]);
      return make("span", { class: "entry", title: manifest.several[line.group] }, dot(lineColour(line.group)), format(mean) + (Number.isNaN(half) ? "" : ` \u00b1 ${format(half, 2)}`), " ");
    }));
  }

  table(all) {
    const { steps, lines } = this.column, { kept, note } = selected(steps.length, TABLE_ROWS, "rows", all);
    return {
      head: ["step", ...lines.flatMap(({ group, runs }) => (runs > 1 ? [manifest.several[group], "95 % interval, half"] : [manifest.several[group]]))],
      rows: kept.map((i) => [stepText(steps[i]), ...lines.flatMap(({ runs }, k) => this.rows[k].slice(0, runs > 1 ? 2 : 1).map((row) => row[i]))]),
      note,
    };
  }
}

class DifferenceCard {
  constructor(column, difference) {
    this.name = `${column.label}: ${manifest.several[difference.group]} less ${manifest.several[0]}`;
    Object.assign(this, mapCard($("cards"), this.name, column.unit, (all) => this.table(all)));
  }

  async update({ column, difference }) {
    const numbers = await array(difference), [, layers, count] = difference.shape, size = layers * count;
    Object.assign(this, { difference, layers, count, values: numbers.subarray(0, size), errors: numbers.subarray(size) });
    this.map = new HeatMap(this.box, {
      rows: layers, ...stepEdges(difference.steps, difference.length), values: this.values, kind: "difference",
      height: () => mapHeight(layers), label: `${this.name}, by layer and step. Arrow keys move.`,
      readout: (cell) => this.say(cell),
    });
    showColours(this.scale, this.map, ` ${column.unit}`);
  }

  say(cell) {
    if (!cell || cell.column < 0) { this.readout.textContent = ""; return; }
    const i = cell.row * this.count + cell.column, error = this.errors[i];
    this.readout.textContent = `layer ${cell.row}, ${stepText(this.difference.steps[cell.column])}: ${format(this.values[i])}`
      + (Number.isNaN(error) ? "" : ` \u00b1 ${format(error, 2)} (95 % interval over seeds)`);
  }

  table(all) {
    const { steps } = this.difference, { kept, note } = selected(steps.length, TABLE_COLUMNS, "columns", all);
    return {
      head: ["layer", ...kept.map((i) => stepText(steps[i]))],
      rows: range(this.layers).map((layer) => [String(layer), ...kept.map((i) => this.values[layer * this.count + i])]),
      note,
    };
  }
}

async function drawSeveral() {
  shownSteps = allSteps();
  $("multiples").before(make("p", { class: "key" }, ...manifest.several.map((name, group) => make("span", {}, dot(lineColour(group)), name))));
  for (const column of manifest.columns) await new Overlay(column).update(column);
  performance.mark("drawn");
  for (const column of manifest.columns) {
    for (const difference of column.differences ?? []) await new DifferenceCard(column, difference).update({ column, difference });
  }
  if (!$("cards").children.length) $("maps").hidden = true;
  zoomSteps(null);
  complete();
}

async function refresh() {
  if (!zoomedByHand) shownSteps = allSteps();
  const multiples = $("multiples"), cards = $("cards");
  multiples.querySelector(".note")?.remove();
  if (!manifest.columns.length) {
    if (!multiples.children.length) multiples.append(make("p", { class: "note", text: "No step has been measured yet." }));
    return;
  }
  const wanted = [];
  const errorsLast = [...manifest.columns].sort((a, b) => Boolean(a.of) - Boolean(b.of));
  for (const column of errorsLast) {
    for (const [kind, Kind] of [["multiple", Multiple], ["card", Card]]) {
      if (kind === "card" && (!column.axes.length || column.of)) continue;
      const id = `${kind}-${column.name}`;
      if (!drawn.has(id)) drawn.set(id, new Kind(column));
      wanted.push([drawn.get(id), column]);
    }
  }
  // Visible charts first; the others when the browser is idle, so that searching and printing find them.
  const later = [];
  for (const [part, column] of wanted) {
    if (near(part.figure ?? part.article)) await part.update(column);
    else later.push([part, column]);
  }
  performance.mark("drawn");
  const version = manifest.version;
  const rest = async () => {
    if (version !== manifest.version) return;
    const next = later.shift();
    if (next) { await next[0].update(next[1]).catch(superseded); idle(rest); return; }
    drawAlerts();
    drawChoice();
    await drawMatrices().catch(superseded);
    if (!zoomedByHand) zoomSteps(null);
    complete(version);
  };
  idle(rest);
}

function superseded(error) {
  if (!LIVE) throw error;  // a live run has a newer version, which the next poll fetches
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  readPalette();
  for (const { plot } of charts) plot.redraw(false);
}

const preferred = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
preferred.addEventListener("change", () => chosenTheme ?? setTheme(preferred.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(chosenTheme);
});
$("print").addEventListener("click", () => print());
let beforePrinting = null;
const PAPER = 940;  // about the width of a printed page in CSS pixels; the style sheet fits charts to the actual width
addEventListener("beforeprint", () => {
  beforePrinting = document.documentElement.dataset.theme;
  setTheme("light");
  for (const { plot, box, height } of charts) {
    const width = box.closest(".multiples") ? (PAPER - 80) / 2 : PAPER - 40;
    plot.setSize({ width, height: height(width) });
  }
});
addEventListener("afterprint", () => {
  setTheme(beforePrinting);
  for (const { plot, box, height } of charts) plot.setSize({ width: box.clientWidth, height: height(box.clientWidth) });
});

// ---- a run that trains ------------------------------------------------------------------------------------------------

async function poll() {
  const status = $("status");
  try {
    if (!document.hidden) {
      const answer = await fetch(`state?version=${manifest.version}`, { cache: "no-store" });
      if (answer.status === 200) {
        manifest = { ...(await answer.json()), live: true };
        arrays = new Map();
        for (const [id, text] of Object.entries(manifest.fragments)) $(id).innerHTML = text;
        await refresh().catch(superseded);
      } else if (answer.status !== 204) throw new Error(await answer.text());
      status.textContent = `following, ${whole(manifest.steps)} measured steps`;
      status.className = "";
    }
  } catch (error) {
    status.textContent = error instanceof TypeError ? "the server does not answer; the page shows its last state" : error.message;
    status.className = "lost";
  }
  setTimeout(poll, POLL_MS);
}

setTheme(preferred.matches ? "dark" : "light");
(manifest.several ? drawSeveral() : manifest.look ? drawLook() : refresh()).catch(superseded);
if (LIVE) {
  $("status").hidden = false;
  $("status").textContent = "following";
  setTimeout(poll, POLL_MS);
}

})();
