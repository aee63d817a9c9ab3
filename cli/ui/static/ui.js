// The page of `weightbus ui`: holds what the server tells of the fleet, and draws it once a frame.
// One stream of server-sent events: a snapshot, then changes. The server is asked for a waterfall
// when a round is looked at, and again when more was told of it. All text goes in as text nodes.

import { el, formatBytes, formatRate, formatSeconds } from "./elements.js";
import { Rows } from "./rows.js";
import { WaterfallView } from "./waterfall.js";

const SILENT_MS = 25000; // the server says something every 10 s
const RETRY_MS = 2000; // after it refused
const ROUND_MS = 500; // a round that runs is asked for this often at most
const AGES_MS = 1000;

const STATES = {
  serving: ["\u25cf", "good"], updating: ["\u25d0", "warn"], starting: ["\u25cb", "warn"],
  stopping: ["\u25c7", "warn"], quarantined: ["\u25a0", "bad"], gone: ["\u2715", "dim"],
};
const ENDS = {
  complete: ["\u2713", "good"], failed: ["\u2715", "bad"], running: ["\u25d0", "warn"], left: ["\u2013", "dim"],
};
const EXPORTS = [["html", "HTML report"], ["perfetto", "Perfetto"], ["otlp-json", "OTLP JSON"], ["json", "JSON"]];

const at = (id) => document.getElementById(id);
const state = {
  link: null, model: null, newest: {}, rounds: [], failures: [], dead_letters: [], skipped: [],
  engines: { order: [], rows: {} }, history: { order: [], rows: {} },
};
let server = { connected: false, since: Date.now() };
let clockMs = 0; // the server's clock before ours
let filter = "";
let shown = null; // { model, round } that is looked at
let dirty = false;

// --- what the server tells

let source = null, heardMs = Date.now();

// A browser opens six connections to a host at most: a page that nobody sees holds none of them.
function listen() {
  source?.close();
  source = null;
  if (document.hidden) return;
  heardMs = Date.now();
  source = new EventSource("api/events");
  source.onmessage = (event) => {
    const told = JSON.parse(event.data);
    heard();
    clockMs = told.now_s * 1000 - Date.now();
    merge(told);
    draw();
    if (shown && isNews(told)) look();
  };
  source.onopen = heard;
  source.onerror = () => {
    unheard();
    if (source?.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  };
}

function heard() {
  heardMs = Date.now();
  if (!server.connected) { server = { connected: true, since: Date.now() }; draw(); }
}

function unheard() {
  if (server.connected) { server = { connected: false, since: Date.now() }; draw(); }
}

function merge(told) {
  for (const table of ["engines", "history"]) {
    const known = told.whole ? (state[table] = { order: [], rows: {} }) : state[table];
    Object.assign(known.rows, told[table].rows);
    if (told[table].order) {
      known.order = told[table].order;
      known.rows = Object.fromEntries(known.order.map((key) => [key, known.rows[key]]));
    }
  }
  for (const name of ["link", "model", "newest", "rounds", "failures", "dead_letters", "skipped"])
    if (name in told) state[name] = told[name] ?? state[name];
}

function isNews(told) {
  const key = `${shown.model}/${shown.round}`;
  return told.whole || key in told.history.rows || told.link?.connected;
}

// --- drawing

function draw() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame(() => {
    dirty = false;
    drawLink();
    if (shown) return;
    drawTiles();
    drawEngines();
    drawFlight();
    drawHistory();
    drawProblems();
  });
}

const matches = (row) =>
  !filter || [row.model, row.engine, row.subject, row.waiting, row.completed, row.failed, row.names, row.late]
    .flat().some((text) => typeof text === "string" && text.toLowerCase().includes(filter));

// In UTC, as in waterfalls; with the date unless it is today's.
function clock(seconds) {
  const [told, today] = [seconds, now()].map((each) => new Date(each * 1000).toISOString());
  return told.slice(told.slice(0, 10) === today.slice(0, 10) ? 11 : 0, 19).replace("T", " ");
}

const now = () => (Date.now() + clockMs) / 1000;
const version = (number) => (number < 0 ? "\u2013" : String(number));

function ago(seconds) {
  const age = Math.max(0, now() - seconds);
  if (age < 60) return `${Math.floor(age)} s ago`;
  if (age < 3600) return `${Math.floor(age / 60)} min ago`;
  return age < 86400 ? `${Math.floor(age / 3600)} h ago` : `${Math.floor(age / 86400)} d ago`;
}

const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function drawLink() {
  const node = at("link"), link = state.link;
  const lost = !server.connected || (link && !link.connected);
  node.classList.toggle("is-lost", Boolean(lost && (link || !server.connected)));
  const [mark, word] = node.children;
  if (!server.connected) {
    setText(mark, "\u25b2");
    setText(word, `page server lost, trying since ${clock(server.since / 1000)} UTC`);
  } else if (link && !link.connected) {
    setText(mark, "\u25b2");
    const why = link.reason ? `: ${link.reason}` : "";
    setText(word, `bus lost, trying since ${clock(link.since_s)} UTC${why}`);
  } else {
    setText(mark, link ? "\u25cf" : "\u25cb");
    setText(word, link ? "live" : "connecting");
  }
  mark.className = `mark ${lost ? "bad" : "good"}`;
  setText(at("bus"), link ? link.url + (state.model ? ` \u00b7 ${state.model}` : "") : "");
}

function drawTiles() {
  const engines = state.engines.order.map((key) => state.engines.rows[key]).filter(matches);
  const there = engines.filter((engine) => engine.status !== "gone");
  const count = (test) => there.filter(test).length;
  const behind = there.filter((engine) => engine.lag > 0);
  const tiles = [
    ["engines", there.length, engines.length > there.length ? `${engines.length - there.length} gone` : ""],
    ["serving", count((engine) => engine.status === "serving"), ""],
    ["behind", behind.length, behind.length ? `by up to ${Math.max(...behind.map((engine) => engine.lag))}` : ""],
    ["quarantined", count((engine) => engine.status === "quarantined"), ""],
    ["rounds in flight", state.rounds.filter(matches).length, ""],
  ];
  const models = Object.entries(state.newest).filter(([model]) => !filter || model.toLowerCase().includes(filter));
  for (const [model, newest] of models.slice(0, 3)) tiles.push([model, newest, "newest version"]);
  if (models.length > 3) tiles.push(["other models", models.length - 3, ""]);
  at("tiles").replaceChildren(...tiles.map(([term, value, small]) =>
    el("div", {}, el("dt", { title: term }, term), el("dd", {}, String(value), el("small", {}, small)))));
}

const cell = (text, kind = "", role = "gridcell") => el("span", { class: kind || null, role, title: text || null }, text);
const TAIL_CHARS = 10; // of a round's id: what tells rounds of one version apart stands there

// A text whose end is always shown: what has no room is left out before it.
const tailed = (text, kind) => {
  const at = Math.max(0, text.length - TAIL_CHARS);
  return el("span", { class: `tailed ${kind}`, role: "gridcell", title: text },
    el("span", {}, text.slice(0, at)), el("span", {}, text.slice(at)));
};
const headOf = (titles) => el("div", { class: "rows-head", role: "row" },
  ...titles.map(([title, kind]) => cell(title, kind, "columnheader")));

const engineRows = new Rows({
  label: "Engines", rowPx: 34,
  head: headOf([["state"], ["engine"], ["model"], ["version"], ["lag", "num wide"], ["last update", "wide"], ["GB/s", "num wide"], ["route", "wide"], ["proof", "wide"]]),
  key: (row) => `${row.model}/${row.engine}`,
  onopen: (row) => row.round && go(row.model, row.round),
  fill: (node, row) => {
    const [mark, kind] = STATES[row.status] ?? ["?", "dim"];
    const moving = row.target_version >= 0 && row.target_version !== row.version;
    node.dataset.state = row.status;
    const took = row.update_s === null ? "" : `${formatSeconds(row.update_s)}, `;
    node.replaceChildren(
      el("span", { role: "gridcell" }, el("span", { class: `mark ${kind}`, "aria-hidden": "true" }, mark), ` ${row.status}`),
      el("span", { role: "rowheader", title: row.engine }, el("b", {}, row.engine), el("span", { class: "dim" }, row.ranks > 1 ? ` \u00d7${row.ranks}` : "")),
      cell(row.model), cell(version(row.version) + (moving ? ` \u2192 ${row.target_version}` : "")),
      cell(row.lag === null ? "" : row.lag === 0 ? "0" : `\u2193 ${row.lag}`, row.lag > 0 ? "num wide warn" : "num wide"),
      cell(row.updated_s === null ? "" : `${took}${ago(row.updated_s)}`, "wide"),
      cell(formatRate(row.gb_per_s), "num wide"), cell(row.routes.join(" + "), "wide"),
      cell(row.verified === "verified" ? "\u2713 verified" : row.verified ? "not offered" : "", "wide"));
  },
});

const historyRows = new Rows({
  label: "History of rounds", rowPx: 34,
  head: headOf([
    ["", ""], ["began (UTC)"], ["model"], ["version"], ["engines", "wide"], ["route", "wide"],
    ["time", "num"], ["bytes", "num wide"], ["GB/s", "num wide"], ["round", "wide"]]),
  key: (row) => `${row.model}/${row.round}`,
  onopen: (row) => go(row.model, row.round),
  fill: (node, row) => {
    const [mark, kind] = ENDS[row.state];
    const engines = [`${row.completed} of ${row.engines}`,
      row.failed && `${row.failed} failed`, row.late.length && `${row.late.length} late`].filter(Boolean).join(", ");
    node.setAttribute("aria-label", `${row.model} version ${row.version}, round ${row.round}, ${row.state}, engines ${engines}; open the waterfall`);
    node.replaceChildren(
      el("span", { role: "gridcell", class: `mark ${kind}`, title: row.state }, mark), cell(clock(row.began_s)),
      el("span", { role: "rowheader" }, row.model), el("b", { role: "gridcell" }, String(row.version)),
      cell(engines, row.failed ? "wide bad" : "wide"), cell(row.routes.join(" + "), "wide"),
      cell(formatSeconds(row.wall_s), "num"), cell(row.bytes ? formatBytes(row.bytes) : "", "num wide"),
      cell(formatRate(row.gb_per_s), "num wide"), tailed(row.round, "wide dim"));
  },
});

function showTable(rows, place, items, empty) {
  const table = rows.root;
  if (table.parentNode !== place) place.replaceChildren(table, el("p", { class: "empty" }));
  setText(place.lastChild, empty);
  table.hidden = !items.length;
  place.lastChild.hidden = Boolean(items.length);
  rows.show(items);
}

const counted = (items, all) =>
  items.length === all.length ? `${all.length}` : `${items.length} of ${all.length}`;

// Why none is shown: the filter hides them, or there is none.
const none = (all, what, empty) => (all.length ? `${what} matches the filter.` : empty);

function drawEngines() {
  const all = state.engines.order.map((key) => state.engines.rows[key]), items = all.filter(matches);
  setText(at("engines-count"), counted(items, all));
  showTable(engineRows, at("engines"), items, none(all, "No engine", "No engine is there. " +
    "Start one with weightbus engine, or weightbus consume beside yours."));
}

function drawHistory() {
  const all = state.history.order.map((key) => state.history.rows[key]);
  const ended = all.filter((row) => row.state !== "running"), items = ended.filter(matches);
  setText(at("history-count"), counted(items, ended));
  showTable(historyRows, at("history"), items,
    none(ended, "No round that ended", "No round has ended in the last hour."));
}

function flightRow(row) {
  const of = row.waiting.length + row.completed.length + row.failed.length;
  const bar = el("div", { class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": of, "aria-valuenow": row.completed.length + row.failed.length,
    "aria-label": `engines that are done with version ${row.version}` });
  for (const [count, kind] of [[row.completed.length, ""], [row.failed.length, "is-failed"]]) {
    const part = el("i", { class: kind || null });
    part.style.width = `${of ? (count / of) * 100 : 0}%`;
    bar.append(part);
  }
  const names = (engines) => engines.slice(0, 6).join(", ") + (engines.length > 6 ? ` and ${engines.length - 6} more` : "");
  const told = [`${row.completed.length} of ${of} ${row.completed.length === 1 ? "serves" : "serve"} it`];
  if (row.failed.length) told.push(`failed: ${names(row.failed)}`);
  if (row.waiting.length) told.push(`to go: ${names(row.waiting)}`);
  return el("a", { class: "flight-row", href: hash(row.model, row.round), "data-key": `${row.model}/${row.round}` },
    el("span", { class: "line" }, el("span", { class: "mark warn", "aria-hidden": "true" }, "\u25d0"), el("b", {}, row.model), `version ${row.version}`,
      row.overdue ? el("span", { class: "bad" }, "\u25b2 overdue") : null,
      el("span", { class: "num", "data-since": row.since_s }, formatAge(row.since_s))),
    bar, el("p", {}, told.join(" \u00b7 ")),
    el("p", {}, [row.epoch >= 0 ? `epoch ${row.epoch}, led by ${row.leader}` : "no plan yet", row.last_stage && `last: ${row.last_stage}`].filter(Boolean).join(" \u00b7 ")));
}

const formatAge = (since) => `${Math.max(0, now() - since).toFixed(0)} s`;

function drawFlight() {
  const rows = state.rounds.filter(matches);
  const empty = none(state.rounds, "No round in flight", "Nothing is on its way.");
  setText(at("flight-count"), counted(rows, state.rounds));
  replaceKept(at("flight"),
    rows.length ? rows.map(flightRow) : [el("p", { class: "empty" }, empty)]);
}

// Puts new nodes in, and the focus back on the node that stands for the same thing.
function replaceKept(place, nodes) {
  const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  place.replaceChildren(...nodes);
  if (key) nodes.find((node) => node.dataset.key === key)?.focus();
}

let problemsDrawn = "";

function drawProblems() {
  const all = [
    ...state.failures.map((each) => ({ at_ns: each.failed_ns, mark: each.late ? "\u25b7" : "\u2715", kind: each.late ? "warn" : "bad", row: each,
      link: hash(each.model, each.round), title: `${each.engine} ${each.late ? "came late" : "failed"}`, what: `${each.model} version ${each.version}${each.quarantined ? ", quarantined" : ""}`, reason: `${each.cause}: ${each.reason}` })),
    ...state.skipped.map((each) => ({ at_ns: each.skipped_ns, mark: "\u25b7", kind: "warn", row: each,
      title: `version ${each.version} skipped`, what: `${each.model}, by ${each.producer}`, reason: `${each.cause}: ${each.reason}` })),
    ...state.dead_letters.map((each) => ({ at_ns: each.reported_ns, mark: "\u2709", kind: "bad", row: each,
      title: "dead letter", what: each.subject, reason: each.reason })),
  ];
  const problems = all.filter((each) => matches(each.row))
    .sort((one, other) => other.at_ns - one.at_ns);
  const drawn = JSON.stringify([filter, all.length,
    problems.map((each) => [each.at_ns, each.title, each.what])]);
  if (drawn === problemsDrawn) return;
  problemsDrawn = drawn;
  setText(at("problems-count"), counted(problems, all));
  const empty = none(all, "No failure or dead letter", "None that the bus remembers.");
  replaceKept(at("problems"), problems.length ? problems.map((each) => el(each.link ? "a" : "div",
    { class: "problem", href: each.link, "data-key": each.link ? `${each.at_ns} ${each.title}` : null },
    el("span", { class: "line" }, el("span", { class: `mark ${each.kind}`, "aria-hidden": "true" }, each.mark), el("b", {}, each.title),
      el("time", {}, `${clock(each.at_ns / 1e9)} UTC`)),
    el("p", {}, each.what), el("p", {}, each.reason)))
    : [el("p", { class: "empty" }, empty)]);
}

// --- one round

const hash = (model, round) => `#/${encodeURIComponent(model)}/${encodeURIComponent(round)}`;
const view = new WaterfallView(at("waterfall"));
let asking = false, askAgain = false, askedMs = 0, returnTo = null;

function go(model, round) { location.hash = hash(model, round); }

// The round that the address names; null: it names none, or cannot be read.
function addressed() {
  const parts = location.hash.split("/");
  if (parts.length !== 3) return null;
  try {
    const [model, round] = parts.slice(1).map(decodeURIComponent);
    return { model, round, isNew: true };
  } catch {
    return null;
  }
}

function route() {
  const before = shown;
  shown = addressed();
  at("fleet").hidden = Boolean(shown);
  at("round").hidden = !shown;
  document.title = shown ? `${shown.model} ${shown.round} \u2013 Weight bus` : "Weight bus";
  if (shown) {
    returnTo = document.activeElement?.closest?.("[data-key]")?.dataset.key ?? returnTo;
    at("waterfall").replaceChildren();
    view.round = null;
    scrollTo(0, 0);
    at("exports").replaceChildren("Save as ", ...EXPORTS.map(([kind, title]) => el("a", { class: "button", download: "",
      href: `api/rounds/${encodeURIComponent(shown.model)}/${encodeURIComponent(shown.round)}/${kind}` }, title)));
    look();
  } else {
    draw();
    if (before && returnTo) requestAnimationFrame(() =>
      [...document.querySelectorAll("#fleet [data-key]")].find((node) => node.dataset.key === returnTo)?.focus());
  }
}

async function look() {
  if (asking) { askAgain = true; return; }
  asking = true;
  do {
    askAgain = false;
    const wanted = shown;
    if (!wanted.isNew) await new Promise((done) => setTimeout(done, Math.max(0, askedMs + ROUND_MS - Date.now())));
    askedMs = Date.now();
    await ask(wanted);
    if (shown && shown !== wanted) askAgain = true;
  } while (askAgain && shown);
  asking = false;
}

async function ask(wanted) {
  let trouble = "";
  try {
    const answer = await fetch(`api/rounds/${encodeURIComponent(wanted.model)}/${encodeURIComponent(wanted.round)}`);
    const told = answer.ok ? await answer.json() : null;
    if (shown !== wanted) return;
    if (told) view.show(told);
    else trouble = await answer.text();
    if (told && wanted.isNew) at("waterfall").querySelector("h2").focus({ preventScroll: true });
    wanted.isNew = wanted.isNew && !told;
  } catch {
    trouble = "The page's server does not answer; this is what it told last.";
  }
  at("round-state").hidden = !trouble;
  setText(at("round-state"), trouble);
}

// --- the reader

at("filter").addEventListener("input", (event) => {
  filter = event.target.value.trim().toLowerCase();
  draw();
});
at("skip").addEventListener("click", (event) => { event.preventDefault(); at("main").focus(); });
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/input|textarea/i.test(event.target.tagName)) {
    event.preventDefault();
    if (shown) location.hash = "";
    at("filter").focus();
  } else if (event.key === "Escape" && event.target === at("filter")) {
    event.target.value = filter = "";
    draw();
  } else if (event.key === "Escape" && shown) location.hash = "";
});
addEventListener("hashchange", route);
document.addEventListener("visibilitychange", listen);
setInterval(() => {
  if (document.hidden) return;
  if (Date.now() - heardMs > SILENT_MS) { unheard(); listen(); }
  if (shown) return;
  engineRows.draw(true);
  for (const node of document.querySelectorAll("[data-since]")) setText(node, formatAge(Number(node.dataset.since)));
}, AGES_MS);
route();
listen();
