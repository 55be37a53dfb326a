"use strict";
// Draws the page from its data, see content_of() in report.py. Nothing of the data is ever read as HTML.

const COLORS = ["#2f80c9", "#e0672a", "#1f9d74", "#c84f9b", "#a9851d", "#7a63d0", "#d3404a", "#3aa6b8", "#7f8a1e", "#8a8f98"];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
const WINDOWS = [0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16]; // of a curve's points on each side of one, to be averaged
const FEW = 6; // lines of which also is drawn what they were before they were smoothed or thinned
const REFRESH = 5000; // milliseconds between two questions to the server
const $ = (id) => document.getElementById(id);
const state = { hidden: new Set(), wide: new Set(), zoom: {}, gridStep: null, grids: null, levelRun: null };
let data = null, plots = [];

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const number = (v) => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ── What is drawn together: a run, or with bands a group of seeds ────────────────────────────────────────────
function entities() {
  const groups = [...new Set(data.runs.map((run) => run.group).filter((group) => group !== null))];
  const banded = $("bands").checked, found = new Map(), settings = new Map();
  data.runs.forEach((run, i) => {
    const setting = run.group === null ? `run ${run.name}` : `group ${run.group}`;
    if (!settings.has(setting)) settings.set(setting, settings.size);
    const key = banded ? setting : `run ${run.name}`;
    if (!found.has(key)) found.set(key, { key, name: banded && run.group !== null ? run.group : run.name, runs: [] });
    found.get(key).runs.push(i);
  });
  // seeds share a color while there are several settings; what is alone of its setting has its own
  const list = [...found.values()], manySettings = settings.size > 1 && groups.length > 0 && !banded;
  const seeds = {};
  list.forEach((entity, i) => {
    const run = data.runs[entity.runs[0]];
    const setting = settings.get(run.group === null ? `run ${run.name}` : `group ${run.group}`);
    const place = manySettings ? setting : i;
    const turn = manySettings ? (seeds[setting] = (seeds[setting] ?? -1) + 1) : Math.floor(i / COLORS.length);
    entity.color = COLORS[place % COLORS.length];
    entity.dash = DASHES[turn % DASHES.length];
    if (entity.runs.length > 1) entity.name += ` (${entity.runs.length} seeds)`;
  });
  return list;
}

// The mean of each point and some neighbours, fewer towards the ends; gaps stay gaps.
function smoothed(values, share) {
  const half = Math.round(values.length * share);
  if (half === 0) return values;
  return values.map((value, i) => {
    if (value === null) return null;
    const reach = Math.min(half, i, values.length - 1 - i);
    let sum = 0, count = 0;
    for (let j = i - reach; j <= i + reach; j++) if (values[j] !== null) { sum += values[j]; count++; }
    return sum / count;
  });
}

// The curve of an entity: x, y, what is faint behind it (values or a band), and whether the band is of seeds.
function curveOf(entity, curves, share) {
  const own = curves.filter((curve) => entity.runs.includes(curve.run));
  if (own.length === 0) return null;
  if (own.length === 1) {
    const [curve] = own, y = smoothed(curve.y, share);
    const found = { x: data.steps[curve.x], y, low: curve.low, high: curve.high };
    return y !== curve.y && !curve.low ? { ...found, faint: curve.y } : found;
  }
  const tables = own.map((curve) => new Map(data.steps[curve.x].map((x, i) => [x, i])));
  const values = own.map((curve) => smoothed(curve.y, share));
  const x = data.steps[own[0].x].filter((step) => tables.every((table) => table.has(step))); // where all seeds are
  const at = x.map((step) => values.map((y, i) => y[tables[i].get(step)]));
  const whole = (f) => at.map((row) => row.includes(null) ? null : f(row));
  return {
    x, y: whole((row) => row.reduce((a, b) => a + b) / row.length), seeds: true,
    low: whole((row) => Math.min(...row)), high: whole((row) => Math.max(...row)),
  };
}

// ── A chart ──────────────────────────────────────────────────────────────────────────────────────────────────
function drawChart(place, key, title, lines) {
  const logX = $("log-x").checked, logY = $("log-y").checked;
  const tables = [], series = [{}], bands = [], shown = [];
  const few = lines.length <= FEW;
  let dropped = 0;
  const usable = (values) => logY ? values.map((v) => v !== null && v <= 0 ? (dropped++, null) : v) : values;
  for (const line of lines) {
    if (!line || line.x.length === 0) continue;
    const table = [line.x], alone = line.x.length === 1;
    const add = (values, options) => { table.push(usable(values)); return series.push({ ...options, points: { show: false } }) - 1; };
    if (line.low && (line.seeds || few)) {
      const edge = { stroke: "transparent", width: 0 };
      const low = add(line.low, edge), high = add(line.high, edge);
      bands.push({ series: [high, low], fill: line.color + "38" });
    }
    if (line.faint && few) add(line.faint, { stroke: line.color + "55", width: 1 });
    const main = add(line.y, { stroke: line.color, width: 1.7, dash: line.dash });
    if (line.x.length < 25) series[main].points = { show: true, size: alone ? 8 : 5, fill: line.color };
    tables.push(table);
    shown.push({ ...line, main });
  }
  const box = element("div", { className: "chart" });
  const toggle = element("button", { textContent: "⤢", title: "wider or narrower" });
  toggle.setAttribute("aria-label", `${title}: wider or narrower`);
  box.setAttribute("role", "figure");
  box.setAttribute("aria-label", title);
  box.append(element("h3", {}, element("span", { textContent: title }), toggle));
  place.append(box);
  if (state.wide.has(key)) box.classList.add("wide");
  if (tables.length === 0) {
    box.append(element("p", { className: "hint", textContent: "nothing to draw of the runs that are shown" }));
    return;
  }
  const size = () => ({ width: box.clientWidth, height: state.wide.has(key) ? 460 : 250 });
  const tip = element("div", { className: "tip", hidden: true });
  const axis = () => ({ stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1, size: 4 }, font: "12px system-ui, sans-serif" });
  const values = (u, splits) => splits.map((v) => v === null ? null : v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6) ? v.toExponential().replace("e+", "e") : String(+v.toPrecision(6)));
  const onLog = { splits: logSplits, filter: (u, splits) => splits };
  const roomy = (u, low, high) => {
    if (low === null) return [null, null];
    if (logY) return [low / 1.1, high * 1.1];
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [low >= 0 && low < margin ? 0 : low - margin, high + margin];
  };
  const u = new uPlot({
    ...size(), series, bands, legend: { show: false },
    scales: {
      x: { time: false, distr: logX ? 3 : 1, range: (u, low, high) => low === high ? [Math.max(logX ? 0.5 : -Infinity, low - 1), high + 1] : [low, high] },
      y: { distr: logY ? 3 : 1, range: roomy },
    },
    axes: [{ ...axis(), ...(logX ? onLog : {}), values, space: 60, size: 34 }, { ...axis(), ...(logY ? onLog : {}), values, size: 58 }],
    cursor: { sync: { key: "steps", setSeries: false, scales: ["x", null] }, drag: { x: true, y: true, uni: 30 }, points: { show: false } },
    hooks: {
      setCursor: [(u) => showTip(u, tip, shown)],
      setSelect: [(u) => { // of the chart under the pointer; its steps go for all charts
        if (!u.over.matches(":hover")) return;
        const { left, top, width, height } = u.select, value = (place, scale) => u.posToVal(place, scale);
        if (width < u.over.clientWidth) state.zoom.x = [value(left, "x"), value(left + width, "x")];
        if (height < u.over.clientHeight) state.zoom[key] = [value(top + height, "y"), value(top, "y")];
      }],
    },
  }, uPlot.join(tables), box);
  u.over.append(tip);
  u.over.addEventListener("mouseleave", () => { tip.hidden = true; });
  u.over.addEventListener("dblclick", () => {
    state.zoom = {};
    plots.forEach((plot) => plot.u.setData(plot.u.data));
  });
  const zoomed = { x: state.zoom.x, y: state.zoom[key] };
  for (const scale of ["x", "y"]) if (zoomed[scale]) u.setScale(scale, { min: zoomed[scale][0], max: zoomed[scale][1] });
  if (dropped) box.append(element("p", { className: "said", textContent: `${dropped} values of 0 or less are not on a log scale` }));
  toggle.addEventListener("click", () => {
    state.wide.has(key) ? state.wide.delete(key) : state.wide.add(key);
    box.classList.toggle("wide");
    plots.forEach((plot) => plot.fit());
  });
  plots.push({ u, fit: () => { if (box.clientWidth) u.setSize(size()); } });
}

// Round numbers for a log axis: decades, or 1, 2, 5 of each, or equal distances where less than those fit in.
function logSplits(u, axis, low, high) {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))], found = [];
  for (let power = from; power <= to; power++) for (const times of to - from > 4 ? [1] : [1, 2, 5]) found.push(+`${times}e${power}`);
  const within = found.filter((value) => value >= low && value <= high);
  if (within.length > 2) return within;
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((value) => value >= rough);
  return Array.from({ length: 9 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((value) => value <= high);
}

// The values nearest to the pointer, highest first.
function showTip(u, tip, shown) {
  const { left, top, idx } = u.cursor;
  if (idx === null || idx === undefined || left < 0 || !u.over.matches(":hover")) { tip.hidden = true; return; }
  const near = [];
  for (const line of shown) {
    const values = u.data[line.main];
    let at = idx; // of this line the nearest step that it has
    for (let d = 0; d < values.length && (values[at] === undefined || values[at] === null); d++) {
      at = idx + (d % 2 ? -1 : 1) * Math.ceil((d + 1) / 2);
      if (at < 0 || at >= values.length) at = idx;
    }
    if (values[at] === undefined || values[at] === null) continue;
    const y = u.valToPos(values[at], "y");
    near.push({ line, at, value: values[at], away: Math.abs(y - top) });
  }
  near.sort((a, b) => a.away - b.away);
  const rows = near.slice(0, 8);
  if (rows.length === 0) { tip.hidden = true; return; }
  rows[0].nearest = true;
  const step = u.data[0][idx];
  tip.replaceChildren(element("div", { textContent: `step ${step}` + (near.length > 8 ? `, ${rows.length} of ${near.length}` : "") }));
  for (const { line, at, value, nearest } of rows.sort((a, b) => b.value - a.value)) {
    const x = u.data[0][at] === step ? "" : ` @ ${u.data[0][at]}`;
    const place = line.low ? line.x.indexOf(u.data[0][at]) : -1;
    const logged = line.faint?.[line.x.indexOf(u.data[0][at])];
    const was = logged === undefined || logged === null ? "" : ` (logged ${number(logged)})`;
    const span = place >= 0 && line.low[place] !== null ? ` (${number(line.low[place])} – ${number(line.high[place])})` : "";
    const row = element("div", { className: nearest ? "near" : "" }, swatch(line), element("span", { textContent: line.name }),
      element("b", { textContent: number(value) + was + span + x }));
    tip.append(row);
  }
  tip.hidden = false;
  const right = left + 16 + tip.offsetWidth > u.over.clientWidth;
  tip.style.left = `${right ? Math.max(left - 12 - tip.offsetWidth, -50) : left + 16}px`;
  tip.style.top = `${Math.max(0, Math.min(top - 10, u.over.clientHeight - tip.offsetHeight))}px`;
}

function swatch({ color, dash }) {
  const made = element("span", { className: "swatch" });
  made.style.borderTopColor = color;
  made.style.borderTopStyle = !dash || dash.length === 0 ? "solid" : dash[0] < 4 ? "dotted" : "dashed";
  return made;
}

// ── The page's parts ─────────────────────────────────────────────────────────────────────────────────────────
function fillTable(place, rows, kind) {
  place.hidden = rows.length < 2;
  if (place.hidden) return place.replaceChildren();
  const line = (tag) => (row) => element("tr", {}, ...row.map((cell) => element(tag, { textContent: cell })));
  place.replaceChildren(element("table", { className: kind }, element("thead", {}, line("th")(rows[0])), element("tbody", {}, ...rows.slice(1).map(line("td")))));
}

const paragraphs = (texts, kind) => texts.map((text) => element("p", { className: kind, textContent: text }));
const isShown = (entity) => !state.hidden.has(entity.key);

function drawChips(list) {
  const chips = list.map((entity) => {
    const chip = element("button", { title: `${entity.name}: click to hide or show, double click for it alone` }, swatch(entity), entity.name);
    chip.setAttribute("aria-pressed", isShown(entity));
    chip.addEventListener("click", (event) => {
      if (event.detail > 1) state.hidden = new Set(list.map((other) => other.key).filter((key) => key !== entity.key));
      else state.hidden.has(entity.key) ? state.hidden.delete(entity.key) : state.hidden.add(entity.key);
      draw();
    });
    return chip;
  });
  const all = element("button", { className: "all", textContent: list.every(isShown) ? "hide all" : "show all" });
  all.addEventListener("click", () => {
    state.hidden = list.every(isShown) ? new Set(list.map((entity) => entity.key)) : new Set();
    draw();
  });
  $("chips").hidden = list.length < 2;
  const scrolled = $("chips").scrollTop;
  $("chips").replaceChildren(...(list.length > 2 ? [all] : []), ...chips);
  $("chips").scrollTop = scrolled;
}

function drawLevels(list, share) {
  const levels = data.charts.filter((chart) => chart.kind === "levels"), place = document.querySelector("#levels .charts");
  $("levels").hidden = levels.length === 0;
  document.querySelector("#levels h2").textContent = `Validation by ${data.level}`;
  document.querySelector("#levels .hint").textContent = `From a low ${data.level} (level 1) to a high one, of the EMA weights if they were validated.`;
  place.replaceChildren();
  if (levels.length === 0) return;
  const withLevels = list.filter((entity) => levels[0].curves.some((curve) => entity.runs.includes(curve.run)));
  if (!withLevels.some((entity) => entity.key === state.levelRun)) state.levelRun = withLevels[0].key;
  const options = withLevels.map((entity) => element("option", { value: entity.key, textContent: entity.name, selected: entity.key === state.levelRun }));
  $("level-run").replaceChildren(...options);
  $("level").parentElement.hidden = $("level-run").parentElement.hidden = list.length < 2;
  $("level").max = levels.length;
  $("level-value").textContent = `${$("level").value} of ${levels.length}`;
  const chosen = withLevels.find((entity) => entity.key === state.levelRun);
  const ramp = (i) => toHex(`hsl(${Math.round(205 + 185 * i / Math.max(1, levels.length - 1))} 65% 52%)`);
  const lines = levels.map((chart, i) => {
    const curve = curveOf(chosen, chart.curves, share);
    return curve && { ...curve, low: undefined, name: chart.name, color: ramp(i), dash: [] };
  });
  drawChart(place, "levels of one", `${chosen.name}: all levels`, lines);
  const legend = levels.map((chart, i) => element("span", {}, swatch({ color: ramp(i) }), chart.name.replace("level ", "")));
  place.lastChild.append(element("div", { className: "legend" }, ...legend));
  if (list.length > 1) {
    const chart = levels[+$("level").value - 1];
    drawChart(place, "one level", `All runs: ${chart.name} of ${levels.length}`, linesOf(list, chart, share));
  }
}

function toHex(color) {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = color;
  return context.fillStyle;
}

const linesOf = (list, chart, share) => list.filter(isShown).map((entity) => {
  const curve = curveOf(entity, chart.curves, share);
  return curve && { ...entity, ...curve };
});

function drawGrids(list) {
  const steps = [...new Set(data.grids.map((grid) => grid.step))].sort((a, b) => a - b), slider = $("grid-step");
  $("grids").hidden = steps.length === 0;
  if (steps.length === 0) return;
  const step = state.gridStep === null ? steps.length - 1 : nearest(steps, state.gridStep);
  slider.max = steps.length - 1;
  slider.value = step;
  $("grid-value").textContent = steps[step];
  document.querySelector("#grids .hint").textContent = `Of each run the samples of this step, or of its nearest; a click enlarges them. ${data.grids_note}`;
  const shown = data.runs.flatMap((run, i) => {
    const own = data.grids.filter((grid) => grid.run === i);
    if (own.length === 0 || !list.some((entity) => isShown(entity) && entity.runs.includes(i))) return [];
    return [own[nearest(own.map((one) => one.step), steps[step])]];
  });
  const key = shown.map((grid) => `${grid.run} ${grid.step}`).join();
  if (key === state.grids) return; // a sound that is played goes on
  state.grids = key;
  const figures = shown.map((grid) => {
    const caption = `${data.runs[grid.run].name}, step ${grid.step}`;
    const open = element("button", { title: "enlarge" }, samples(grid, caption));
    open.addEventListener("click", () => enlarge(grid));
    return element("figure", {}, open, element("figcaption", { textContent: caption }), players(grid));
  });
  document.querySelector(".pictures").classList.toggle("many", figures.length > FEW);
  document.querySelector(".pictures").replaceChildren(...figures);
}

// A grid of pictures, or a page of texts, which is in the data or asked for.
function samples(grid, caption) {
  if (grid.text === undefined && !grid.source.endsWith(".txt")) return element("img", { loading: live ? "lazy" : "eager", alt: caption, src: grid.source });
  const page = element("pre");
  const fill = (text) => { page.textContent = text.replace(/─{20,}/g, "─".repeat(20)); }; // rules, in a narrow column
  if (grid.text === undefined) fetch(grid.source).then((answer) => answer.text()).then(fill, () => {});
  else fill(grid.text);
  return page;
}

// A player for each sound of a grid of spectrograms, below its prompt.
function players(grid) {
  return element("div", { className: "sounds" }, ...(grid.sounds ?? []).map(({ label, source }) => {
    const player = source === null ? "not in this page" : element("audio", { controls: true, preload: live ? "none" : "metadata", src: source });
    return element("div", {}, element("div", { textContent: label, title: label }), player);
  }));
}

function nearest(steps, wanted) {
  return steps.reduce((best, step, i) => Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? i : best, 0);
}

let enlarged = null;
function enlarge(grid) {
  enlarged = grid;
  const dialog = $("enlarged"), caption = `${data.runs[grid.run].name}, step ${grid.step}`;
  const sounds = players(grid);
  sounds.addEventListener("click", (event) => event.stopPropagation()); // elsewhere a click closes
  dialog.querySelector("div").replaceChildren(samples(grid, caption), sounds);
  dialog.querySelector("p").textContent = `${caption}  (← → other steps, ↑ ↓ other runs)`;
  if (!dialog.open) dialog.showModal();
}

function turn(event) {
  const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!by || !enlarged) return;
  event.preventDefault();
  const own = (run) => data.grids.filter((grid) => grid.run === run);
  if (by[1]) {
    const steps = own(enlarged.run), next = steps[steps.findIndex((grid) => grid.step === enlarged.step) + by[1]];
    if (next) enlarge(next);
    return;
  }
  for (let run = enlarged.run + by[0]; run >= 0 && run < data.runs.length; run += by[0]) {
    const grids = own(run);
    if (grids.length) return enlarge(grids[nearest(grids.map((grid) => grid.step), enlarged.step)]);
  }
}

// ── All of it ────────────────────────────────────────────────────────────────────────────────────────────────
function draw() {
  const list = entities(), share = WINDOWS[+$("smooth").value];
  plots.forEach((plot) => plot.u.destroy());
  plots = [];
  $("smooth-value").textContent = share ? `over ${200 * share} % of a curve` : "off";
  drawChips(list);
  for (const kind of ["curves", "throughput"]) {
    const place = document.querySelector(`#${kind} .charts`), charts = data.charts.filter((chart) => chart.kind === kind);
    $(kind).hidden = charts.length === 0;
    place.replaceChildren();
    for (const chart of charts) drawChart(place, chart.name, chart.title, linesOf(list, chart, chart.name === "lr" ? 0 : share));
  }
  drawLevels(list, share);
  drawGrids(list);
}

function show(content) {
  const first = data === null, hasGroups = content.runs?.some((run) => run.group !== null);
  $("problem").hidden = !content.error;
  $("problem").textContent = content.error ?? "";
  if (content.error) return;
  data = content;
  document.title = document.querySelector("h1").textContent = data.title;
  $("about").textContent = (live ? "Kept up to date; as of " : "As of ") + data.written;
  document.querySelector("main").hidden = false;
  fillTable(document.querySelector("#summary .table"), data.summary, "numbers");
  document.querySelector("#summary .notes").replaceChildren(...paragraphs(data.notes, ""));
  document.querySelector("#curves .hint").textContent = ["Over optimizer steps. Drag to zoom in, double click to zoom out.", data.thinned, hasGroups ? "A band of seeds has their mean and reaches from the lowest to the highest, each smoothed, as far as all have come." : ""].join(" ");
  const differs = data.differs;
  $("differences").hidden = !differs.headline;
  document.querySelector("#differences .headline").textContent = differs.headline;
  document.querySelector("#differences .notes").replaceChildren(...paragraphs(differs.unfair, "unfair"));
  fillTable(document.querySelector("#differences .table"), differs.rows, "values");
  const open = [...document.querySelectorAll("#manifest details[open] summary")].map((one) => one.textContent);
  document.querySelector("#manifest .tables").replaceChildren(...data.manifest.map(({ title, rows, kind }, i) => {
    const place = element("div", { className: "table" });
    fillTable(place, rows, kind ?? "values");
    return element("details", { open: first ? i === 0 && data.runs.length < 4 : open.includes(title), hidden: rows.length < 2 }, element("summary", { textContent: title }), place);
  }));
  $("bands").parentElement.hidden = !hasGroups;
  if (first) $("bands").checked = hasGroups;
  draw();
  const sections = [...document.querySelectorAll("section")].filter((one) => !one.hidden && one.querySelector("h2"));
  $("sections").replaceChildren(...sections.map((one) => element("a", { href: `#${one.id}`, textContent: one.querySelector("h2").textContent })));
}

async function refresh() {
  try {
    const content = await (await fetch(`data.json?${data?.version ?? ""}`)).json();
    if (content.error || content.version) show(content);
    else $("problem").hidden = true;
  } catch {
    $("problem").textContent = "difftrain report has ended: this is what it showed last";
    $("problem").hidden = false;
  }
  setTimeout(refresh, REFRESH);
}

for (const id of ["bands", "log-y", "log-x", "smooth", "level"]) $(id).addEventListener("input", () => {
  if (id === "bands") state.hidden.clear();
  draw();
});
$("level-run").addEventListener("input", () => { state.levelRun = $("level-run").value; draw(); });
$("grid-step").addEventListener("input", () => {
  const steps = [...new Set(data.grids.map((grid) => grid.step))].sort((a, b) => a - b), at = +$("grid-step").value;
  state.gridStep = at === steps.length - 1 ? null : steps[at]; // at the end it follows the newest
  drawGrids(entities());
});
$("enlarged").addEventListener("keydown", turn);
$("enlarged").addEventListener("click", () => $("enlarged").close());
addEventListener("resize", () => plots.forEach((plot) => plot.fit()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data && draw());

const inPage = JSON.parse($("data").textContent), live = !inPage.runs;
if (live) refresh();
else show(inPage);
