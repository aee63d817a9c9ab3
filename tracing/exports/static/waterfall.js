// Draws one waterfall: shared by the page of `weightbus ui` and the HTML report, where it is the
// only script. Imports nothing and asks nobody. Text of the bus only ever becomes a text node.
// Times are seconds after the origin, sizes bytes, as in `Waterfall` (tracing/waterfall.py).

const ROW_PX = 30;
const ROWS_AHEAD = 8; // drawn above and below what is in view
const EXPANDED_ROWS_MAX = 300; // more than these begin folded
const BUCKETS_DRAWN = 64;
const TRACK_PX = 640; // about as wide as the bars have room: what a step's name must fit in
const BEYOND = 2.5; // first tokens so many times later than the update are first left out
const STAGES = ["negotiate", "fetch", "h2d", "broadcast", "reload", "commit"];
const NAMES = { h2d: "host to device", first_token: "first token" };

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function threeDigits(value) {
  const size = Math.abs(value);
  const digits = size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function formatSeconds(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const milliseconds = seconds * 1000;
  return Math.abs(milliseconds) < 999.5 ? `${threeDigits(milliseconds)} ms` : `${threeDigits(seconds)} s`;
}

export function formatBytes(size) {
  for (const [factor, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (size >= 0.9995 * factor) return `${threeDigits(size / factor)} ${unit}`;
  return `${size} B`;
}

export function formatRate(rate) {
  if (rate === null || rate === undefined) return "";
  return rate >= 0.005 ? threeDigits(rate) : "<0.01";
}

const percent = (share) => `${Math.round(share * 100)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// A table of which only the rows in view are in the document. Every row has the same height. Arrow
// keys, Home, End, PageUp and PageDown move among them; one row at a time can be reached by Tab.
export class Rows {
  constructor({ label, role = "grid", row = "row", head, rowPx = ROW_PX, fill, key, onkey, onopen }) {
    Object.assign(this, { rowPx, fill, key, onkey, onopen, rowRole: row });
    this.items = [];
    this.active = null; // key of the row that Tab reaches
    this.drawn = new Map();
    this.body = el("div", { class: "rows-body", role: "rowgroup" });
    this.root = el("div", { class: "rows", role, "aria-label": label, onscroll: () => this.draw() });
    if (head) this.root.append(head);
    this.root.append(this.body);
    this.root.addEventListener("keydown", (event) => this.move(event));
    this.root.addEventListener("click", (event) => this.clicked(event));
    this.root.addEventListener("focusin", (event) => this.focused(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  show(items) {
    this.items = items;
    this.index = new Map(items.map((item, at) => [this.key(item), at]));
    if (!this.index.has(this.active)) this.active = items.length ? this.key(items[0]) : null;
    this.body.style.height = `${items.length * this.rowPx}px`;
    this.root.setAttribute("aria-rowcount", items.length + 1);
    this.draw(true);
  }

  draw(refill = false) {
    const top = this.root.scrollTop, height = this.root.clientHeight || 600;
    const first = Math.max(0, Math.floor(top / this.rowPx) - ROWS_AHEAD);
    const last = Math.min(this.items.length, Math.ceil((top + height) / this.rowPx) + ROWS_AHEAD);
    const wanted = new Set();
    for (let at = first; at < last; at++) wanted.add(this.key(this.items[at]));
    if (this.active !== null) wanted.add(this.active); // never lose the focus
    for (const [key, node] of this.drawn)
      if (!wanted.has(key)) { node.remove(); this.drawn.delete(key); }
    const ordered = [...wanted].sort((one, other) => this.index.get(one) - this.index.get(other));
    for (const key of ordered) this.place(key, refill);
    this.order(ordered.map((key) => this.drawn.get(key)));
  }

  // In the document as on the screen, for readers of the one who do not see the other. A node that
  // is moved loses the focus: so what stands before the focused one is moved behind it.
  order(nodes) {
    let next = this.body.firstChild;
    for (const node of nodes) {
      while (node !== next && node === document.activeElement) {
        const later = next.nextSibling;
        this.body.append(next);
        next = later;
      }
      if (node === next) next = next.nextSibling;
      else this.body.insertBefore(node, next);
    }
  }

  place(key, refill) {
    const at = this.index.get(key), item = this.items[at];
    let node = this.drawn.get(key);
    const isNew = !node;
    if (isNew) {
      node = el("div", { class: "row", role: this.rowRole });
      node.style.height = `${this.rowPx}px`;
      node.dataset.key = key;
      this.drawn.set(key, node);
      this.body.append(node);
    }
    node.style.top = `${at * this.rowPx}px`;
    node.setAttribute("aria-rowindex", at + 2);
    node.tabIndex = key === this.active ? 0 : -1;
    if (isNew || refill) this.fill(node, item);
  }

  focus(at) {
    if (!this.items.length) return;
    const before = this.drawn.get(this.active);
    at = Math.max(0, Math.min(this.items.length - 1, at));
    this.active = this.key(this.items[at]);
    const top = at * this.rowPx, head = this.root.firstChild === this.body ? 0 : this.rowPx;
    if (top < this.root.scrollTop) this.root.scrollTop = top;
    else if (top + this.rowPx + head > this.root.scrollTop + this.root.clientHeight)
      this.root.scrollTop = top + this.rowPx + head - this.root.clientHeight;
    this.draw();
    if (before) before.tabIndex = -1;
    const node = this.drawn.get(this.active);
    node.tabIndex = 0;
    node.focus();
  }

  move(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("a,button")) return;
    const at = this.index?.get(this.active) ?? 0;
    const page = Math.max(1, Math.floor(Math.min(this.root.clientHeight, innerHeight) / this.rowPx) - 2);
    const to = {
      ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: this.items.length - 1,
      PageDown: at + page, PageUp: at - page,
    }[event.key];
    if (to !== undefined) this.focus(to);
    else if (event.key === "Enter" || event.key === " ") this.onopen?.(this.items[at]);
    else if (!this.onkey?.(event, this.items[at], at)) return;
    event.preventDefault();
  }

  clicked(event) {
    const node = event.target.closest(".row");
    if (!node || event.target.closest("a,button")) return;
    const at = this.index.get(node.dataset.key);
    this.focus(at);
    this.onopen?.(this.items[at]);
  }

  focused(event) {
    const node = event.target.closest(".row");
    if (!node) return;
    const before = this.drawn.get(this.active);
    if (before && before !== node) before.tabIndex = -1;
    this.active = node.dataset.key;
    node.tabIndex = 0;
    this.onfocus?.(this.items[this.index.get(this.active)]);
  }
}

// The chart and all that is said beside it.
export class WaterfallView {
  constructor(root) {
    this.root = root;
    this.folded = new Map(); // engine -> chosen by the reader
    this.whole = null; // chosen by the reader: with the tail or without
    this.round = null;
  }

  show(waterfall) {
    const id = `${waterfall.model}/${waterfall.round}`;
    if (id !== this.round) {
      this.round = id;
      this.folded.clear();
      this.whole = null;
      this.build();
    }
    this.waterfall = waterfall;
    const rows = waterfall.engines.reduce((sum, engine) => sum + 1 + engine.stages.length, 1);
    this.isLong = rows > EXPANDED_ROWS_MAX;
    this.critical = new Set(waterfall.critical_path.map((step) => step.engine));
    this.head.replaceChildren(...heading(waterfall));
    this.facts.replaceChildren(...facts(waterfall));
    this.told.replaceChildren(el("b", {}, "\u25c6 Critical path"), waterfall.critical_told);
    this.told.hidden = !waterfall.critical_told;
    this.showProblems();
    this.scale();
    this.showRows();
    this.note.textContent = note(waterfall);
  }

  build() {
    this.head = el("header");
    this.facts = el("dl", { class: "wf-facts" });
    this.told = el("p", { class: "wf-told" });
    this.problems = el("ul", { class: "wf-problems", "aria-label": "Failures" });
    this.tail = el("button", { type: "button", onclick: () => { this.whole = !this.isWhole; this.scale(); this.showRows(); } });
    this.fold = el("button", { type: "button", onclick: () => this.foldAll() });
    this.next = el("button", { type: "button", onclick: () => this.nextCritical() }, "Next critical stage");
    const legend = el("div", { class: "legend" });
    for (const stage of STAGES) legend.append(el("span", {}, el("i", { class: `c-${stage}` }), name(stage)));
    legend.append(el("span", {}, el("i", { class: "is-critical" }), "\u25c6 critical path"));
    this.axis = el("div", { class: "axis", role: "columnheader", "aria-label": "time" });
    const head = el("div", { class: "rows-head", role: "row" },
      el("span", { role: "columnheader" }, "engine, rank, stage"), this.axis,
      el("span", { role: "columnheader", class: "num" }, "time"),
      el("span", { role: "columnheader", class: "num wide" }, "bytes"),
      el("span", { role: "columnheader", class: "num wide" }, "GB/s"),
      el("span", { role: "columnheader", class: "num wide" }, "route, link"));
    this.rows = new Rows({
      label: "Waterfall", role: "treegrid", head,
      key: (item) => item.key,
      fill: (node, item) => this.fill(node, item),
      onopen: (item) => item.kind === "engine" && this.toggle(item.engine.engine),
      onkey: (event, item, at) => this.onkey(event, item, at),
    });
    this.rows.onfocus = (item) => this.detail.replaceChildren(...describe(item, this.waterfall));
    this.detail = el("div", { class: "wf-detail", "aria-live": "polite" },
      "Choose a row: \u2191 \u2193 move, \u2190 \u2192 fold, c goes to the next critical stage.");
    this.note = el("p", { class: "wf-note" });
    this.root.replaceChildren(this.head, this.facts, this.told, this.problems,
      el("div", { class: "wf-tools" }, this.next, this.fold, this.tail, legend),
      el("div", { class: "wf-chart" }, this.rows.root, this.detail), this.note);
  }

  showProblems() {
    const failed = this.waterfall.engines.filter((engine) => engine.outcome === "failed");
    this.problems.hidden = !failed.length;
    this.problems.replaceChildren(...failed.map((engine) => el("li", {},
      el("span", { class: "bad" }, "\u2715 "), el("b", {}, engine.engine), ` ${problem(engine)}`)));
  }

  get isWhole() {
    return this.whole ?? !this.hasTail;
  }

  get updated() {
    const ends = this.waterfall.engines.flatMap((engine) => [engine.end_s ?? 0,
      ...engine.stages.map((stage) => stage.start_s + stage.duration_s)]);
    return ends.reduce((last, end) => Math.max(last, end), 0);
  }

  get hasTail() { return this.updated > 0 && this.waterfall.span_s > BEYOND * this.updated; }

  scale() {
    const { span_s } = this.waterfall;
    this.end = (this.isWhole ? span_s : this.updated * 1.05) || 1;
    this.tail.hidden = !this.hasTail;
    this.tail.textContent = this.isWhole ? "Only the update" : `All of it (${formatSeconds(span_s)})`;
    this.ticks = ticks(this.end);
    this.axis.replaceChildren(...this.ticks.map((at) => {
      const label = el("span", { class: at > this.end * 0.96 ? "is-last" : null }, at === 0 ? "0" : formatSeconds(at));
      label.style.left = this.at(at);
      return label;
    }));
  }

  at(time) { return `${(Math.max(0, Math.min(1, time / this.end)) * 100).toFixed(4)}%`; }

  isFolded(engine) {
    return this.folded.get(engine.engine) ??
      (this.isLong && engine.outcome !== "failed" && !this.critical.has(engine.engine));
  }

  showRows() {
    const items = [];
    if (this.waterfall.critical_path.length) items.push({ key: "path", kind: "path" });
    for (const engine of this.waterfall.engines) {
      items.push({ key: `e ${engine.engine}`, kind: "engine", engine });
      if (this.isFolded(engine)) continue;
      engine.stages.forEach((stage, at) =>
        items.push({ key: `s ${engine.engine} ${at}`, kind: "stage", engine, stage }));
    }
    this.rows.root.classList.toggle("is-long", items.length > EXPANDED_ROWS_MAX || this.isLong);
    this.fold.textContent = this.waterfall.engines.some((engine) => this.isFolded(engine)) ? "Unfold all" : "Fold all";
    this.next.hidden = !this.waterfall.engines.some((engine) => engine.stages.some((stage) => stage.critical));
    this.rows.show(items);
  }

  toggle(name) {
    const engine = this.waterfall.engines.find((each) => each.engine === name);
    this.folded.set(name, !this.isFolded(engine));
    this.showRows();
  }

  foldAll() {
    const fold = !this.waterfall.engines.some((engine) => this.isFolded(engine));
    for (const engine of this.waterfall.engines) this.folded.set(engine.engine, fold);
    this.showRows();
  }

  nextCritical() {
    for (const engine of this.waterfall.engines)
      if (engine.stages.some((stage) => stage.critical)) this.folded.set(engine.engine, false);
    this.showRows();
    const items = this.rows.items, from = this.rows.index.get(this.rows.active) ?? -1;
    for (let step = 1; step <= items.length; step++) {
      const at = (from + step) % items.length;
      if (items[at].stage?.critical) return this.rows.focus(at);
    }
  }

  onkey(event, item, at) {
    if (event.key === "c") this.nextCritical();
    else if (event.key === "ArrowRight" && item.kind === "engine" && this.isFolded(item.engine)) this.toggle(item.engine.engine);
    else if (event.key === "ArrowLeft" && item.kind === "engine" && !this.isFolded(item.engine)) this.toggle(item.engine.engine);
    else if (event.key === "ArrowLeft" && item.kind === "stage")
      this.rows.focus(this.rows.index.get(`e ${item.engine.engine}`));
    else if (event.key === "ArrowRight") this.rows.focus(at + 1);
    else return false;
    return true;
  }

  fill(node, item) {
    const cells = { path: this.pathCells, engine: this.engineCells, stage: this.stageCells }[item.kind].call(this, item, node);
    node.classList.add(`is-${item.kind}`);
    node.setAttribute("aria-level", item.kind === "stage" ? 2 : 1);
    node.replaceChildren(...cells);
  }

  track(...children) {
    const lines = this.ticks.map((at) => this.put(el("i", { class: "grid-line" }), at));
    return el("div", { class: "track", role: "gridcell" }, ...lines, ...children);
  }

  put(node, start, duration) {
    node.style.left = this.at(start);
    if (duration !== undefined) node.style.width = `calc(${this.at(start + duration)} - ${this.at(start)})`;
    return node;
  }

  pathCells() {
    const whose = this.waterfall.critical_path.at(-1).engine;
    const steps = this.waterfall.critical_path.map((step) => {
      const text = step.engine && step.engine !== whose ? `${step.engine} ${name(step.what)}` : name(step.what);
      const isThin = (step.duration_s / this.end) * TRACK_PX < 12 + text.length * 6;
      const node = el("span", { class: `step c-${step.what} is-${step.what}${isThin ? " is-thin" : ""}`,
        title: `${stepName(step)}: ${formatSeconds(step.duration_s)}` }, text);
      return this.put(node, step.start_s, step.duration_s);
    });
    const total = this.waterfall.critical_path.reduce((sum, step) => sum + step.duration_s, 0);
    return [
      el("span", { class: "label", role: "rowheader" }, el("span", { class: "crit" }, "\u25c6 "), el("b", {}, "critical path"), whose ? ` of ${whose}` : ""),
      this.track(...steps), ...numbers(formatSeconds(total), "", "", "")];
  }

  engineCells({ engine }, node) {
    const folded = this.isFolded(engine), drawn = [];
    node.setAttribute("aria-expanded", String(!folded));
    node.classList.toggle("is-critical", this.critical.has(engine.engine));
    const first = engine.start_s ?? engine.joined_s ?? engine.stages[0]?.start_s;
    if (first !== undefined && first !== null) {
      const end = engine.end_s ?? this.waterfall.span_s;
      drawn.push(this.put(el("i", { class: "span" }), first, Math.max(0, end - first)));
    }
    for (const stage of engine.stages.slice(0, 64)) drawn.push(this.bar(stage, false));
    for (const [at, what] of [[engine.joined_s, "joined"], [engine.planned_s, "plan"]])
      if (at !== null && at <= this.end) drawn.push(this.put(el("i", { class: "tick", title: `${what} ${formatSeconds(at)}` }), at));
    const token = engine.first_token_s;
    if (token !== null)
      drawn.push(this.put(el("i", { class: `token${token > this.end ? " is-beyond" : ""}`, title: `first token ${formatSeconds(token)}` }), token));
    const [mark, kind, word] = outcome(engine);
    return [
      el("span", { class: "label", role: "rowheader" },
        el("span", { class: "mark dim", "aria-hidden": "true" }, folded ? "\u25b8" : "\u25be"), engine.engine,
        el("span", { class: kind }, ` ${mark} `), el("span", { class: "dim" }, word)),
      this.track(...drawn),
      ...numbers(formatSeconds(engine.end_s), engine.bytes ? formatBytes(engine.bytes) : "",
        formatRate(rate(engine)), engine.routes.join(" + "))];
  }

  stageCells({ stage }, node) {
    node.classList.toggle("is-critical", stage.critical);
    return [
      el("span", { class: "label", role: "rowheader" },
        stage.rank === null ? "" : `rank ${stage.rank} `, el("b", {}, stage.stage),
        stage.ok ? null : el("span", { class: "bad" }, " \u2715 failed"),
        stage.critical ? el("span", { class: "crit" }, "\u25c6", el("span", { class: "sr" }, " critical")) : null),
      this.track(this.bar(stage, true)),
      ...numbers(formatSeconds(stage.duration_s), stage.bytes ? formatBytes(stage.bytes) : "",
        formatRate(stage.gb_per_s),
        stage.link_share === null ? stage.link : `${percent(stage.link_share)} ${stage.link}`)];
  }

  bar(stage, withBuckets) {
    const node = el("div", { class: `bar c-${stage.stage}${stage.ok ? "" : " is-failed"}${stage.critical ? " is-critical" : ""}`,
      title: `${stage.stage} ${formatSeconds(stage.start_s)} \u2192 ${formatSeconds(stage.start_s + stage.duration_s)}` });
    this.put(node, stage.start_s, stage.duration_s);
    if (withBuckets && stage.duration_s > 0) {
      const step = Math.max(1, Math.ceil(stage.buckets.length / BUCKETS_DRAWN));
      for (let at = step; at < stage.buckets.length; at += step) {
        const line = el("i");
        line.style.left = `${((stage.buckets[at].start_s - stage.start_s) / stage.duration_s) * 100}%`;
        node.append(line);
      }
    }
    return node;
  }
}

const name = (stage) => NAMES[stage] ?? stage;

function stepName(step) {
  const who = step.engine + (step.rank === null || step.rank === undefined ? "" : `/${step.rank}`);
  const what = step.what === "wait" && step.waited_for ? `wait for ${step.waited_for}` : name(step.what);
  return who ? `${who} ${what}` : what;
}

const rate = (engine) =>
  engine.bytes && engine.end_s !== null && engine.start_s !== null && engine.end_s > engine.start_s
    ? engine.bytes / 1e9 / (engine.end_s - engine.start_s) : null;

function numbers(time, bytes, gigabytes, link) {
  return [
    el("span", { class: "num", role: "gridcell" }, time),
    el("span", { class: "num wide", role: "gridcell" }, bytes),
    el("span", { class: "num wide", role: "gridcell" }, gigabytes),
    el("span", { class: "num wide", role: "gridcell" }, link)];
}

function outcome(engine) {
  if (engine.outcome === "complete")
    return ["\u2713", "good", engine.verified === "verified" ? "verified" : "serving"];
  if (engine.outcome === "failed") return ["\u2715", "bad", engine.quarantined ? "quarantined" : "failed"];
  return ["\u2026", "warn", "under way"];
}

function problem(engine) {
  const told = [engine.cause, engine.reason].filter(Boolean).join(": ") || "failed";
  return `${told}${engine.quarantined ? " (quarantined)" : ""}`;
}

function heading(waterfall) {
  const counts = { complete: 0, failed: 0, unfinished: 0 };
  for (const engine of waterfall.engines) counts[engine.outcome]++;
  const of = waterfall.engines.length;
  const state = counts.failed ? el("span", { class: "wf-state bad" }, `\u2715 ${counts.failed} of ${plural(of, "engine")} failed`)
    : counts.unfinished ? el("span", { class: "wf-state warn" }, `\u2026 ${counts.complete} of ${plural(of, "engine")} done`)
      : el("span", { class: "wf-state good" }, `\u2713 ${plural(of, "engine")} serving`);
  const parts = [`round ${waterfall.round}`];
  if (waterfall.leader) parts.push(`led by ${waterfall.leader}, epoch ${waterfall.epoch}`);
  if (waterfall.producer) parts.push(`published by ${waterfall.producer}`);
  parts.push(new Date(waterfall.origin_ns / 1e6).toISOString().replace("T", " ").replace("Z", " UTC"));
  const sub = el("p", { class: "wf-sub" }, parts.join(" \u00b7 "));
  if (waterfall.trace_id) sub.append(" \u00b7 trace ", el("span", { class: "mono" }, waterfall.trace_id));
  return [el("div", { class: "wf-head" },
    el("h2", { tabindex: "-1" }, waterfall.model, el("span", { class: "dim" }, ` version ${waterfall.version}`)), state), sub];
}

function facts(waterfall) {
  const fact = (term, value, small) => el("div", {}, el("dt", {}, term), el("dd", {}, value, el("small", {}, small)));
  const found = [];
  const since = {
    checkpoint_ready: "CheckpointReady", stored: "its storing", heard: "heard of",
  }[waterfall.origin] ?? "the first message";
  found.push(waterfall.wall_s === null
    ? fact("update", "\u2013", "no engine serves it yet")
    : fact("update", formatSeconds(waterfall.wall_s), `${since} \u2192 last engine`));
  const tokens = waterfall.engines.map((engine) => engine.first_token_s).filter((at) => at !== null);
  if (tokens.length) found.push(fact("first tokens", formatSeconds(Math.max(...tokens)),
    tokens.length === 1 ? "of one engine" : `the last of ${tokens.length} engines`));
  if (waterfall.bytes) found.push(fact("moved", formatBytes(waterfall.bytes), "into parameters"));
  if (waterfall.gb_per_s !== null) found.push(fact("rate", `${formatRate(waterfall.gb_per_s)} GB/s`, "over the whole update"));
  const paused = Math.max(0, ...waterfall.engines.map((engine) => engine.paused_s));
  if (paused) found.push(fact("longest pause", formatSeconds(paused), "an engine served nothing"));
  found.push(fact("clocks", ...clocks(waterfall)));
  return found;
}

// By how much the times may be off, or that nobody knows: as `waterfall_view` says it.
function clocks(waterfall) {
  const residuals = waterfall.engines.map((engine) => engine.clock_residual_s);
  if (waterfall.origin === "checkpoint_ready") residuals.push(waterfall.clock_residual_s);
  return residuals.length && residuals.every((residual) => residual !== null)
    ? [`\u00b1 ${formatSeconds(Math.max(...residuals))}`, "off the bus's at most"]
    : ["\u2013", "some were not compared with the bus's"];
}

function note(waterfall) {
  const late = formatSeconds(waterfall.late_s);
  const since = {
    checkpoint_ready: "the creation of CheckpointReady",
    stored: "when the bus stored CheckpointReady",
    heard: `when the first engine heard of the version, ${late} after it was there`,
  }[waterfall.origin]
    ?? "the earliest message: that of CheckpointReady is gone, or its clock is ahead";
  return `Times count from ${since}. GB = 10\u2079 bytes. ` +
    "Percent of a link: what moved over it meanwhile, of what was measured for it. " +
    "On an engine's line: | joined and plan, \u25c6 first token.";
}

function describe(item, waterfall) {
  if (item.kind === "path") return [el("b", {}, "Critical path "), waterfall.critical_path
    .map((step) => `${stepName(step)} ${formatSeconds(step.duration_s)}`).join(" \u2192 ")];
  const engine = item.engine;
  if (item.kind === "engine") {
    const parts = [];
    if (engine.start_s !== null) parts.push(`heard after ${formatSeconds(engine.start_s)}`);
    if (engine.joined_s !== null) parts.push(`joined ${formatSeconds(engine.joined_s)}`);
    if (engine.planned_s !== null) parts.push(`plan ${formatSeconds(engine.planned_s)}`);
    if (engine.end_s !== null) parts.push(`${engine.outcome === "failed" ? "gave up" : "served"} ${formatSeconds(engine.end_s)}`);
    if (engine.first_token_s !== null) parts.push(`first token ${formatSeconds(engine.first_token_s)}`);
    if (engine.paused_s) parts.push(`paused ${formatSeconds(engine.paused_s)}`);
    if (engine.routes.length) parts.push(engine.routes.join(" + ") + (engine.plan_reasons.length ? ` (${engine.plan_reasons.join("; ")})` : ""));
    if (engine.clock_residual_s !== null) parts.push(`clock \u00b1 ${formatSeconds(engine.clock_residual_s)}`);
    if (engine.cause || engine.reason) parts.push(problem(engine));
    return [el("b", {}, `${engine.engine} `), parts.join(", ")];
  }
  const stage = item.stage, parts = [];
  parts.push(`${formatSeconds(stage.start_s)} \u2192 ${formatSeconds(stage.start_s + stage.duration_s)}, ${formatSeconds(stage.duration_s)}`);
  if (stage.route) parts.push(stage.route);
  if (stage.bytes) parts.push(formatBytes(stage.bytes));
  if (stage.gb_per_s !== null) parts.push(`${formatRate(stage.gb_per_s)} GB/s`);
  if (stage.link_share !== null) parts.push(`${percent(stage.link_share)} of the link ${stage.link}`);
  if (stage.buckets.length) parts.push(`${stage.buckets.length} buckets`);
  if (stage.critical) parts.push("on the critical path");
  if (!stage.ok) parts.push(`failed: ${stage.error}`);
  return [el("b", {}, `${engine.engine}${stage.rank === null ? "" : ` rank ${stage.rank}`} ${name(stage.stage)} `), parts.join(", ")];
}

function ticks(end) {
  const rough = end / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let count = 0; count * step <= end * 1.0001; count++) found.push(count * step);
  return found;
}

export function readReport() {
  return JSON.parse(document.getElementById("waterfall").textContent);
}

export function showReport(root, waterfall) {
  const view = new WaterfallView(root);
  view.show(waterfall);
  return view;
}
