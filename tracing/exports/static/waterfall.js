// Draws one waterfall: shared by the page of `weightbus ui` and the HTML report, where it and what
// it imports are the only script (exports/html.py has the order). Asks nobody.
// Times are seconds after the origin, sizes bytes, as in `Waterfall` (tracing/waterfall.py).

import { el, formatBytes, formatRate, formatSeconds, percent } from "./elements.js";
import { Rows } from "./rows.js";
import { describe, facts, heading, name, note, outcome, problem, stepName } from "./told.js";

const EXPANDED_ROWS_MAX = 300; // more than these begin folded
const BUCKETS_DRAWN = 64;
const TRACK_PX = 640; // what bars have room for, until that is known
const LABEL_PX = 76; // what a label of the axis needs, if it is the last, which stands beside its line
const TICKS = 6; // at most about so many
const BEYOND = 2.5; // first tokens so many times later than the update are first left out
const STAGES = ["negotiate", "fetch", "h2d", "broadcast", "reload", "commit"];

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
    this.showLate();
    this.scale();
    this.showRows();
    this.note.textContent = note(waterfall);
  }

  build() {
    this.head = el("header");
    this.facts = el("dl", { class: "wf-facts" });
    this.told = el("p", { class: "wf-told" });
    this.problems = el("ul", { class: "wf-problems", "aria-label": "Failures" });
    this.late = el("ul", { class: "wf-late", "aria-label": "Late engines" });
    this.tail = el("button", { type: "button", onclick: () => { this.whole = !this.isWhole; this.scale(); this.showRows(); } });
    this.fold = el("button", { type: "button", onclick: () => this.foldAll() });
    this.next = el("button", { type: "button", onclick: () => this.nextCritical() }, "Next critical stage");
    const legend = el("div", { class: "legend" });
    for (const stage of STAGES) legend.append(el("span", {}, el("i", { class: `c-${stage}` }), name(stage)));
    legend.append(el("span", {}, el("i", { class: "is-critical" }), "\u25c6 critical path"));
    this.axis = el("div", { class: "axis", role: "columnheader", "aria-label": "time" });
    new ResizeObserver(() => this.resized()).observe(this.axis);
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
    this.root.replaceChildren(this.head, this.facts, this.told, this.problems, this.late,
      el("div", { class: "wf-tools" }, this.next, this.fold, this.tail, legend),
      el("div", { class: "wf-chart" }, this.rows.root, this.detail), this.note);
  }

  showProblems() {
    const failed = this.waterfall.engines.filter((engine) => engine.outcome === "failed");
    this.problems.hidden = !failed.length;
    this.problems.replaceChildren(...failed.map((engine) => el("li", {},
      el("span", { class: "bad" }, "\u2715 "), el("b", {}, engine.engine), ` ${problem(engine)}`)));
  }

  showLate() {
    const late = this.waterfall.late ?? [];
    this.late.hidden = !late.length;
    this.late.replaceChildren(...late.map((engine) => el("li", {},
      el("span", { class: "warn" }, "\u25b7 "), el("b", {}, engine.engine), ` ${engine.told}`)));
  }

  resized() {
    if (!this.waterfall || !this.axis.clientWidth || this.axis.clientWidth === this.width) return;
    this.scale();
    this.showRows();
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
    this.width = this.axis.clientWidth || TRACK_PX;
    this.ticks = ticks(this.end, Math.max(1, Math.min(TICKS, Math.floor(this.width / LABEL_PX))));
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
      const isThin = (step.duration_s / this.end) * this.width < 12 + text.length * 6;
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

// About `count` times, round ones, and 0; the end itself if no other has room.
function ticks(end, count) {
  const rough = end / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.9999);
  if (step > end * 1.0001) return [0, end];
  const found = [];
  for (let at = 0; at * step <= end * 1.0001; at++) found.push(at * step);
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
