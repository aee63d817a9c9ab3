// What is said of a waterfall in words: above its chart, below it, and of a row that is chosen.

import { el, formatBytes, formatRate, formatSeconds, percent, plural } from "./elements.js";

const NAMES = { h2d: "host to device", first_token: "first token" };

export const name = (stage) => NAMES[stage] ?? stage;

export function stepName(step) {
  const who = step.engine + (step.rank === null || step.rank === undefined ? "" : `/${step.rank}`);
  const what = step.what === "wait" && step.waited_for ? `wait for ${step.waited_for}` : name(step.what);
  return who ? `${who} ${what}` : what;
}

export function outcome(engine) {
  if (engine.outcome === "complete")
    return ["\u2713", "good", engine.verified === "verified" ? "verified" : "serving"];
  if (engine.outcome === "failed") return ["\u2715", "bad", engine.quarantined ? "quarantined" : "failed"];
  return ["\u2026", "warn", "under way"];
}

export function problem(engine) {
  const told = [engine.cause, engine.reason].filter(Boolean).join(": ") || "failed";
  return `${told}${engine.quarantined ? " (quarantined)" : ""}`;
}

export function heading(waterfall) {
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

export function facts(waterfall) {
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

export function note(waterfall) {
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

export function describe(item, waterfall) {
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
  if (stage.buckets.length) parts.push(plural(stage.buckets.length, "bucket"));
  if (stage.critical) parts.push("on the critical path");
  if (!stage.ok) parts.push(`failed: ${stage.error}`);
  return [el("b", {}, `${engine.engine}${stage.rank === null ? "" : ` rank ${stage.rank}`} ${name(stage.stage)} `), parts.join(", ")];
}
