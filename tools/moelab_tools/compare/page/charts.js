// Draws the report's charts into their places with Observable Plot (`Plot`, `d3`: page/vendor), each at the width that it
// finds, again when that changes. `report` is {variants: [{name, colour, main}], figures: {id: {kind, ...}}}; what a kind
// holds is said where it is made (figures.py, frontier.py, forest.py, layers.py). Colours are the page's own variables,
// so that dark mode and print need no drawing of their own. Texts of runs become text nodes, never markup.
"use strict";

const FONT = "12px system-ui, sans-serif", NARROW = 460, PRINT = {wide: 700, cells: 220, other: 340};
const pen = document.createElement("canvas").getContext("2d");
const variant = line => line.own ?? report.variants[line.v];  // `own` where lines are no variants (reach.py)
const tone = {good: "var(--good)", bad: "var(--bad)", open: "var(--open)"};

function textWidth(text) {
  pen.font = FONT;
  return pen.measureText(text).width;
}
// Beginning and end of a name that is too long: seeds and suffixes stand at its end.
function fitted(text, width) {
  if (textWidth(text) <= width) return text;
  let kept = text.length;
  const cut = () => text.slice(0, Math.ceil(kept * 0.6)) + "…" + text.slice(text.length - Math.floor(kept * 0.4));
  while (kept > 2 && textWidth(cut()) > width) kept--;
  return cut();
}
const si = d3.format("~s");
function amount(axis) {
  return value => axis.includes("second") ? d3.format(",~r")(value) : axis.includes("memory") ? `${value}`
    : axis.includes("FLOP") ? si(value) : si(value).replace("G", "B");
}
const digits = value => Math.abs(value) >= 1000 ? d3.format(",.0f")(value) : d3.format(".4~g")(value);

// Labels that would lie on each other are moved apart, in their order.
function apart(labels, gap, low, high) {
  const sorted = labels.slice().sort((a, b) => a.at - b.at);
  let edge = low;
  for (const one of sorted) edge = (one.at = Math.max(one.at, edge)) + gap;
  edge = high;
  for (const one of sorted.reverse()) edge = (one.at = Math.min(one.at, edge)) - gap;
  return labels;
}
function write(svg, x, y, text, {fill = "var(--ink)", anchor = "start", weight = 400, full = text} = {}) {
  const node = d3.select(svg).append("text").attr("x", x).attr("y", y).attr("dy", "0.32em").attr("fill", fill)
    .attr("text-anchor", anchor).attr("font-weight", weight).text(text);
  node.attr("stroke", "var(--card)").attr("stroke-width", 3).attr("paint-order", "stroke").append("title").text(full);
  return node;
}

function curves(place, figure, width, state) {
  const order = figure.lines.slice().sort((a, b) => variant(a).main - variant(b).main);
  const labelled = order.filter(line => variant(line).main), narrow = width < NARROW;
  const room = Math.min(d3.max(labelled, line => textWidth(variant(line).name)) || 0, width * (narrow ? 0.3 : 0.34));
  const points = order.flatMap(line => figure.xs[line.x].map((x, i) => ({
    x, y: line.y[i], low: line.low?.[i], high: line.high?.[i], v: line.v, name: variant(line).name,
    colour: variant(line).colour, main: variant(line).main, alone: figure.xs[line.x].length === 1,
  })));
  const inside = state.x ? points.filter(p => p.x >= state.x[0] && p.x <= state.x[1]) : points;
  const view = !state.x && !state.full && figure.view
    || [figure.zero && !state.x ? 0 : d3.min(inside, p => p.low ?? p.y), d3.max(inside, p => p.high ?? p.y)];
  const spread = view[1] - view[0] || Math.abs(view[1]) || 1;
  const y = [view[0] - (figure.zero || figure.view === view ? 0 : 0.04 * spread), view[1] + 0.04 * spread];
  const height = Math.max(narrow ? 250 : 290, labelled.length * 15 + 70);
  const format = amount(figure.x);
  const main = points.filter(p => p.main), pale = points.filter(p => !p.main);
  const line = {x: "x", y: "y", z: "v", stroke: "colour", clip: true};
  const svg = Plot.plot({
    width, height, marginLeft: 46, marginRight: room + 18, marginTop: 14, marginBottom: 40,
    color: {type: "identity"}, y: {domain: y, nice: false},
    x: figure.names ? {type: "point", domain: figure.names} : {domain: state.x ?? d3.extent(points, p => p.x)},
    marks: [
      Plot.gridY({stroke: "var(--line)", strokeOpacity: 1, ticks: 5}),
      Plot.axisY({label: null, ticks: 5, color: "var(--dim)", tickSize: 0, tickFormat: digits}),
      Plot.axisX({label: figure.x, labelArrow: "none", color: "var(--dim)",
        ...(figure.names ? {ticks: legible(figure.names, width - room - 64), tickSize: 0} : {ticks: narrow ? 3 : 5, tickFormat: format})}),
      Plot.lineY(pale, {...line, strokeWidth: 1.2}),
      Plot.areaY(main.filter(p => p.low !== undefined),
        {x: "x", y1: "low", y2: "high", z: "v", fill: "colour", fillOpacity: 0.17, clip: true}),
      Plot.lineY(main, {...line, strokeWidth: 2}),
      Plot.dot(points.filter(p => figure.marks && p.main || p.alone), {x: "x", y: "y", fill: "colour", r: 2.6, clip: true}),
      Plot.tip(inside.filter(p => p.y >= y[0] && p.y <= y[1]), Plot.pointer({x: "x", y: "y", maxRadius: 30, title: p =>
        `${p.name}\n${digits(p.y)} ${figure.unit}` + (p.low === undefined ? "" : ` (${digits(p.low)} to ${digits(p.high)})`)
        + `\n${figure.names ? p.x : format(p.x)} ${figure.x}`})),
    ],
  });
  const sx = svg.scale("x"), sy = svg.scale("y");
  const labels = labelled.map(one => {
    const xs = figure.xs[one.x], last = state.x ? Math.max(0, d3.bisectRight(xs, state.x[1]) - 1) : xs.length - 1;
    const at = Math.min(Math.max(sy.apply(one.y[last]), 14), height - 40);
    return {one, at, from: at, x: Math.min(sx.apply(xs[last]), width - room - 18)};
  });
  for (const {one, at, from, x} of apart(labels, 14, 14, height - 40)) {
    d3.select(svg).append("path").attr("d", `M${x + 3},${from}L${width - room - 8},${at}`).attr("fill", "none")
      .attr("stroke", variant(one).colour).attr("stroke-opacity", 0.45);
    write(svg, width - room - 2, at, fitted(variant(one).name, room), {fill: "var(--ink)", full: variant(one).name});
    d3.select(svg).append("circle").attr("cx", width - room - 8).attr("cy", at).attr("r", 2.5).attr("fill", variant(one).colour);
  }
  if (!figure.names) zoomable(svg, place, sx, state, [46, 14, width - room - 18, height - 40]);
  place.replaceChildren(svg);
}
// As many names of an axis as fit, so that none lies on the next.
function legible(names, width) {
  const every = Math.ceil(names.length * (d3.max(names, textWidth) + 8) / width);
  return names.filter((_, i) => i % every === 0);
}
// Drag: this part of x. Double-click: all of it, and back. Fingers scroll the page.
function zoomable(svg, place, sx, state, [left, top, right, bottom]) {
  const brush = d3.brushX().extent([[left, top], [right, bottom]]).touchable(false).on("end", event => {
    if (!event.selection) return;
    const [from, to] = event.selection.map(sx.invert);
    state.x = to > from ? [from, to] : null;
    redraw(place);
  });
  const layer = d3.select(svg).append("g").call(brush).lower();
  layer.select(".selection").attr("fill", "var(--dim)").attr("stroke", "none");
  layer.select(".overlay").attr("cursor", "crosshair");
  svg.addEventListener("dblclick", () => {
    if (state.x) state.x = null; else state.full = !state.full;
    redraw(place);
  });
}

function intervals(place, figure, width) {
  const rows = figure.rows, wide = width >= 700, words = rows.some(row => row.word);
  const narrow = width < NARROW && (words || d3.max(rows, row => textWidth(row.name)) > 0.3 * width), step = narrow ? 38 : 25;
  const bold = row => row.tone === "open" ? 400 : 650;
  const names = narrow ? 0 : Math.min(d3.max(rows, row => textWidth(row.name)) + 18, width * 0.32);
  const texts = wide ? d3.max(rows, row => textWidth(row.text)) + 14 : 0;
  const right = narrow || !words ? 10 : texts + d3.max(rows, row => textWidth(row.word)) * 1.08 + 14;
  const top = 12 + (narrow ? 14 : 0), height = top + step * rows.length + 44, [low, high] = figure.reach;
  const held = value => Math.min(Math.max(value, low), high);
  const shown = rows.map((row, i) => ({...row, i, colour: tone[row.tone]}));
  const ticks = Math.max(2, Math.floor((width - names - right) / 75));
  const known = shown.filter(row => row.low !== null && row.low < high && row.high > low);
  const svg = Plot.plot({
    width, height, marginLeft: names + 8, marginRight: right, marginTop: top, marginBottom: 44, color: {type: "identity"},
    x: {domain: [low, high]}, y: {type: "point", domain: rows.map((_, i) => i), padding: 0.5, axis: null},
    marks: [
      figure.band ? Plot.rect([0], {x1: Math.max(-figure.band, low), x2: Math.min(figure.band, high), fill: "var(--pale)", fillOpacity: 0.3}) : null,
      Plot.gridX({stroke: "var(--line)", strokeOpacity: 1, ticks}),
      Plot.ruleX([0], {stroke: "var(--ink)", strokeWidth: 1.2}),
      Plot.axisX({label: fitted(figure.axis, width - 20), labelArrow: "none", labelAnchor: "center", color: "var(--dim)",
        ticks, tickFormat: v => (v > 0 ? "+" : v < 0 ? "−" : "") + d3.format("~g")(Math.abs(v))}),
      Plot.link(known, {x1: row => held(row.low), x2: row => held(row.high), y1: "i", y2: "i", stroke: "colour", strokeWidth: 2}),
      Plot.text(known.filter(row => row.low < low), {x: low, y: "i", text: () => "◀", fill: "colour", textAnchor: "start", dx: -2}),
      Plot.text(known.filter(row => row.high > high), {x: high, y: "i", text: () => "▶", fill: "colour", textAnchor: "end", dx: 2}),
      Plot.text(shown.filter(row => row.low === null ? row.x < low || row.x > high : row.low >= high || row.high <= low), {
        x: row => held(row.x), y: "i", text: row => row.x > 0 ? "further ▶" : "◀ further", fill: "colour",
        textAnchor: row => row.x > 0 ? "end" : "start"}),
      Plot.dot(shown.filter(row => row.x > low && row.x < high), {x: "x", y: "i", r: 4.5, fill: "colour"}),
      Plot.tip(shown, Plot.pointerY({x: row => held(row.x), y: "i", lineWidth: 40, title: row => `${row.name}\n${row.text} ${figure.unit}`
        + (figure.base ? `\n${d3.format("+.2f")(100 * row.x / figure.base).replace("-", "−")} %` : "")
        + (row.word ? `, ${row.word}` : "")})),
    ],
  });
  const sy = svg.scale("y");
  for (const row of shown) {
    const y = sy.apply(row.i);
    if (narrow) {
      const left = row.word ? width - textWidth(row.word) - 34 : width - 20;
      write(svg, 8, y - 15, fitted(row.name, left), {full: row.name});
      if (row.word) write(svg, width - 10, y - 15, row.word, {anchor: "end", fill: row.colour, weight: bold(row)});
      continue;
    }
    write(svg, names, y, fitted(row.name, names - 6), {anchor: "end", full: row.name});
    if (row.word) write(svg, width - right + 10 + texts, y, row.word, {fill: row.colour, weight: bold(row)});
    if (wide) write(svg, width - right + 10, y, row.text, {fill: "var(--dim)"}).style("font-variant-numeric", "tabular-nums");
  }
  place.replaceChildren(svg);
}

function points(place, figure, width) {
  const narrow = width < NARROW, all = figure.points.map(one => ({...one, ...variant(one)}));
  const front = figure.front.map(i => all[i]), height = narrow ? 270 : 310, format = amount(figure.x);
  const [x0, x1] = d3.extent(all, p => p.x), [y0, y1] = [d3.min(all, p => p.low), d3.max(all, p => p.high)];
  const room = 0.08 * (y1 - y0 || Math.abs(y1)), across = figure.log ? [x0 / 1.4, x1 * 1.4] : [x0 - 0.1 * (x1 - x0), x1 + 0.1 * (x1 - x0)];
  const box = [50, 12, width - 16, height - 42];
  const sideways = (figure.log ? d3.scaleLog : d3.scaleLinear)(across, [box[0], box[2]]);
  beside(all, sideways);
  const svg = Plot.plot({
    width, height, marginLeft: box[0], marginRight: 16, marginTop: box[1], marginBottom: 42, color: {type: "identity"},
    x: {type: figure.log ? "log" : "linear", domain: across}, y: {domain: [y0 - room, y1 + room]},
    marks: [
      Plot.gridY({stroke: "var(--line)", strokeOpacity: 1, ticks: 5}),
      Plot.axisY({label: null, ticks: 5, color: "var(--dim)", tickSize: 0, tickFormat: digits}),
      Plot.axisX({label: figure.x, labelArrow: "none", color: "var(--dim)", ticks: narrow ? 3 : 5, tickFormat: format}),
      Plot.lineY(front, {x: "at", y: "y", curve: "step-after", stroke: "var(--dim)", strokeDasharray: "3 3"}),
      Plot.ruleX(all.filter(p => p.high > p.low), {x: "at", y1: "low", y2: "high", stroke: "colour", strokeWidth: 2}),
      Plot.dot(all.filter(p => !p.main), {x: "at", y: "y", r: 3.5, fill: "colour"}),
      Plot.dot(all.filter(p => p.main), {x: "at", y: "y", r: 5, fill: "colour", stroke: "var(--card)"}),
      Plot.tip(all, Plot.pointer({x: "at", y: "y", title: p => `${p.name}\n${digits(p.y)} ${figure.unit}`
        + (p.high > p.low ? ` (${digits(p.low)} to ${digits(p.high)})` : "") + `\n${format(p.x)} ${figure.x}`})),
    ],
  });
  const sy = svg.scale("y"), dots = all.map(p => square(sideways(p.at), sy.apply(p.y), 6));
  const bars = all.map(p => [sideways(p.at) - 2, sy.apply(p.high), sideways(p.at) + 2, sy.apply(p.low)]), names = [];
  for (const p of all.filter(p => p.main)) {
    const text = fitted(p.name, width * 0.4), at = [sideways(p.at), sy.apply(p.y), textWidth(text)];
    const found = seat(...at, [...dots, ...bars, ...names], box) ?? seat(...at, [...dots, ...names], box);
    if (!found) continue;  // no room: the tip says who it is
    names.push(found.area);
    write(svg, found.x, found.y, text, {anchor: found.anchor, full: p.name});
  }
  place.replaceChildren(svg);
}
// Points that cost the same stand side by side.
function beside(all, scale) {
  const sorted = all.slice().sort((a, b) => a.x - b.x);
  for (let i = 0; i < sorted.length;) {
    let j = i;
    while (j < sorted.length && scale(sorted[j].x) - scale(sorted[i].x) < 4) j++;
    const gap = Math.min(12, 60 / (j - i));
    sorted.slice(i, j).forEach((p, k) => { p.at = scale.invert(scale(p.x) + (k - (j - i - 1) / 2) * gap); });
    i = j;
  }
}
const square = (x, y, r) => [x - r, y - r, x + r, y + r];
const clash = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
// A place for a name beside its dot that lies on nothing else: right, left, above, below, then further off.
function seat(x, y, width, taken, box) {
  for (const far of [0, 14, 28, 42])
    for (const [dx, dy, anchor] of [[9, 0, "start"], [-9, 0, "end"], [0, -13, "middle"], [0, 13, "middle"], [9, -13, "start"], [9, 13, "start"], [-9, -13, "end"], [-9, 13, "end"]]) {
      const at = {x: x + dx, y: y + dy + Math.sign(dy || 1) * far, anchor};
      const left = at.x - {start: 0, end: width, middle: width / 2}[anchor];
      at.area = [left, at.y - 7, left + width, at.y + 7];
      const fits = at.area[0] >= box[0] - 2 && at.area[2] <= box[2] + 14 && at.area[1] >= box[1] - 10 && at.area[3] <= box[3];
      if (fits && !taken.some(other => clash(at.area, other))) return at;
    }
  return null;
}

// Cells: a byte each, 0 to 254 of the scale, 255 where nothing is known.
const SCALES = {
  balance: d3.scaleLinear([0, 0.125, 0.25, 0.5, 1], ["#dfe8f1", "#f6dfb0", "#f0a850", "#d0542a", "#7a0a1c"]),
  load: d3.scaleLinear([0, 0.001, 0.125, 0.25, 0.5, 1], ["#000000", "#1c327d", "#78a0d7", "#e8e8e4", "#f0963c", "#8c0a19"]),
};
let shownMeasure = "max_violation";
function cells(place, figure) {
  const picture = figure.pictures[shownMeasure] ?? Object.values(figure.pictures)[0];
  const bytes = Uint8Array.from(atob(picture.cells), c => c.charCodeAt(0));
  const columns = figure.columns, rows = figure.rows.length, canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  const pixels = new ImageData(columns, rows);
  bytes.forEach((byte, i) => {
    if (byte === 255) return;
    const colour = d3.rgb(SCALES[figure.scale](byte / 254));
    pixels.data.set([colour.r, colour.g, colour.b, 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const tall = Math.max(7, Math.min(18, 150 / rows));
  canvas.style.height = `${tall * rows}px`;
  const grid = d3.create("div").attr("class", "cells-grid"), every = Math.ceil(13 / tall);
  const names = grid.append("div").attr("class", "rows");
  figure.rows.forEach((name, i) => {
    if (i % every === 0) names.append("span").style("top", `${(i + 0.5) * tall}px`).text(name);
  });
  grid.append(() => canvas);
  const ends = grid.append("div").attr("class", "columns"), format = amount(figure.axis);
  ends.append("span").text(figure.axis === "tokens" ? "0" : "expert 0");
  ends.append("span").text(figure.axis === "tokens" ? `${format(figure.end)} tokens` : `${figure.end - 1}`);
  const reading = d3.create("div").attr("class", "reading");
  canvas.addEventListener("pointermove", event => {
    const box = canvas.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
    const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
    const byte = bytes[row * columns + column], where = figure.axis === "tokens"
      ? `${format((column + 1) / columns * figure.end)} tokens` : `expert ${column}`;
    const value = byte === 255 ? "nothing known" : `${byte === 254 ? "≥ " : ""}${(byte / 254 * picture.most).toFixed(2)} ${picture.name}`;
    reading.text(`${figure.rows[row]}, ${where}: ${value}`);
  });
  place.replaceChildren(grid.node(), reading.node());
}
// What the colours of a section's cells mean; and where there are several measures, which is shown.
function key(place) {
  const figure = Object.values(report.figures).find(one => one.kind === "cells" && one.scale === place.dataset.scale);
  const picture = figure.pictures[shownMeasure] ?? Object.values(figure.pictures)[0], most = picture.most;
  const entry = (share, text) => {
    const span = d3.create("span");
    span.append("i").style("background", SCALES[figure.scale](share));
    span.append("b").style("font-weight", 400).text(text);
    return span.node();
  };
  const entries = figure.scale === "load"
    ? [[0, "no token"], [0.125, "half its fair share"], [0.25, "its fair share"], [0.5, "twice"], [1, "four times and more"]]
    : [0, 0.125, 0.25, 0.5, 1].map(share => [share, `${share * most}${share === 1 && most > 1 ? " and more" : ""}`]);
  const nodes = entries.map(([share, text]) => entry(share, text));
  if (Object.keys(figure.pictures).length > 1) {
    const choice = d3.create("select").attr("aria-label", "measure");
    for (const [id, one] of Object.entries(figure.pictures)) choice.append("option").attr("value", id).property("selected", id === shownMeasure).text(one.name);
    choice.on("change", event => {
      shownMeasure = event.target.value;
      document.querySelectorAll(".plot").forEach(one => report.figures[one.id].scale === figure.scale && redraw(one));
      key(place);
    });
    nodes.unshift(choice.node());
  } else nodes.unshift(document.createTextNode(picture.name));
  place.replaceChildren(...nodes);
}

const KINDS = {curves, intervals, points, cells}, states = {};
let printing = false;
function redraw(place) {
  const figure = report.figures[place.id], chart = place.closest(".chart");
  const width = !printing ? place.clientWidth : chart.classList.contains("wide") ? PRINT.wide
    : chart.parentElement.classList.contains("cells") || chart.parentElement.classList.contains("domains") ? PRINT.cells : PRINT.other;
  if (!width) return;  // folded away
  try {
    KINDS[figure.kind](place, figure, width, states[place.id] ??= {x: null, full: false});
  } catch (error) {
    place.textContent = `This chart can't be drawn: ${error}`;
  }
}
const places = document.querySelectorAll(".plot"), widths = new Map();
// In the next frame: a drawing changes heights, which an observer must not do while it is told of sizes.
const observer = new ResizeObserver(entries => requestAnimationFrame(() => {
  for (const {target} of entries)
    if (!printing && widths.get(target) !== target.clientWidth) {
      widths.set(target, target.clientWidth);
      redraw(target);
    }
}));
places.forEach(place => {
  widths.set(place, place.clientWidth);
  redraw(place);
  observer.observe(place);
});
document.querySelectorAll("[data-scale]").forEach(key);
const folded = new Set();
window.addEventListener("beforeprint", () => {
  printing = true;
  document.querySelectorAll("details:not([open])").forEach(one => {
    if (one.dataset.print !== "no") { folded.add(one); one.open = true; }
  });
  places.forEach(redraw);
});
window.addEventListener("afterprint", () => {
  printing = false;
  folded.forEach(one => { one.open = false; });
  folded.clear();
  places.forEach(redraw);
});
