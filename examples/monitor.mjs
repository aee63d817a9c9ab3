// Watches Weight bus from Node.js: prints what happens as one JSON object per line, until Ctrl-C.
//
//   npm install @nats-io/transport-node @nats-io/jetstream @msgpack/msgpack
//   WEIGHTBUS_NATS_URL=nats://HOST:PORT node monitor.mjs [MODEL] [--since 10m | --from-version N]
//
// It only reads: no update waits for it, however slow it is. What is said: docs/messages.md.
import { decode } from "@msgpack/msgpack";
import { DeliverPolicy, jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect, Match } from "@nats-io/transport-node";
import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";

/**
 * What is said on the bus; the fields of every type are those of `weightbus schema`.
 * @typedef {{type: string, model: string, version?: number, engine?: string, round?: string,
 *   reason?: string, [field: string]: unknown}} Message
 * @typedef {Message & {stored: string}} Event - and when the server stored it.
 */

/** @returns {never} */
function fail(/** @type {Error | string | undefined | void} */ why) {
  console.error(`monitor.mjs: ${(why instanceof Error ? why.message : why) || "the bus is gone"}`);
  process.exit(1);
}

process.on("uncaughtException", fail);
process.stdout.on("error", () => process.exit(0)); // whoever read our output has gone
const { values: given, positionals } = parseArgs({
  allowPositionals: true,
  options: { since: { type: "string" }, "from-version": { type: "string" } },
});
const servers = process.env.WEIGHTBUS_NATS_URL ?? fail("WEIGHTBUS_NATS_URL is needed");
const model = positionals[0] ?? "*";
const units = { s: 1, m: 60, h: 3600, d: 86400 };
const [, count, unit] = /^(\d+)([smhd])$/.exec(given.since ?? "0s") ?? fail(`${given.since}: is no time`);
const fromVersion = given["from-version"] === undefined ? -1 : Number(given["from-version"]);
if (!Number.isSafeInteger(fromVersion)) fail(`${given["from-version"]}: is no version`);

const nc = await connect({ servers, timeout: 5000, maxReconnectAttempts: 30 }).catch(fail);
nc.closed().then((error) => fail(error)); // it was lost for a minute
const jsm = await jetstreamManager(nc);

/** The sequence to read a stream from; of one, so that nothing is lost if we must begin again. */
async function beginning(/** @type {string} */ stream) {
  if (fromVersion >= 0) return 1;
  const ago = new Date(Date.now() - 1000 * Number(count) * units[/** @type {"s"} */ (unit)]);
  const { state } = await jsm.streams.info(stream);
  const first = given.since && (await jsm.direct.getMessage(stream, { start_time: ago, next_by_subj: ">" }));
  return first ? first.seq : state.last_seq + 1;
}

/** Called when the connection is lost. */
const onLost = /** @type {Set<() => void>} */ (new Set());
(async () => {
  for await (const { type } of nc.status()) if (type === "disconnect") onLost.forEach((look) => look());
})();

/** What the bus answers, once it does: it may be away, or back and not have made its streams yet. */
async function patiently(/** @type {() => Promise<any>} */ ask) {
  for (;;) {
    try {
      return await ask();
    } catch {
      await setTimeout(200); // in vain for a minute: `nc.closed()` ends us
    }
  }
}

/**
 * The messages of a stream in their order, also those of the time when the connection was lost. If
 * the bus came back without its data: `Missed`, then what the new stream holds, `again`.
 */
async function* messages(
  /** @type {string} */ stream, /** @type {string} */ subject, /** @type {object} */ from, /** @type {object} */ again,
) {
  const open = async (/** @type {object} */ start) => {
    const { created } = await jsm.streams.info(stream);
    const consumer = await jetstream(nc).consumers.get(stream, { filter_subjects: [subject], ...start });
    return { created, reading: await consumer.consume({ max_messages: 256, expires: 5000 }) };
  };
  for (let opened = await open(from); ; opened = await patiently(() => open(again))) {
    const { created, reading } = opened;
    let last = 0;
    const look = async () => {
      const now = await patiently(() => jsm.streams.info(stream));
      const isSame = now.created === created && now.state.last_seq >= last;
      if (!isSame) reading.stop();
      return isSame;
    };
    let looked = look();
    const lookAgain = () => void (looked = look());
    onLost.add(lookAgain);
    for await (const m of reading) {
      if (!(await looked)) break; // its number is of the new stream
      last = m.seq;
      const isJson = m.headers?.get("Content-Type", Match.IgnoreCase) === "application/json";
      const stored = m.time.toISOString();
      try {
        const said = m.data.length ? /** @type {Message} */ (isJson ? m.json() : decode(m.data)) : undefined;
        yield { said, subject: m.subject, stored };
      } catch (error) {
        console.error(`monitor.mjs: ${m.subject} cannot be read: ${error}`);
      }
    }
    onLost.delete(lookAgain);
    console.log(JSON.stringify({ type: "Missed", stream: stream.replace(/^(KV_)?weightbus-/, ""), at_most: null }));
  }
}

async function tell(/** @type {string} */ stream, /** @type {string} */ subject) {
  const at = (/** @type {number} */ seq) => ({ deliver_policy: DeliverPolicy.StartSequence, opt_start_seq: seq });
  for await (const { said, stored } of messages(stream, subject, at(await beginning(stream)), at(1)))
    if (said && (said.version ?? fromVersion) >= fromVersion)
      console.log(JSON.stringify(/** @type {Event} */ ({ stored, ...said })));
}

/** Heartbeats, when they say something new; no value: the engine is gone. */
async function tellEngines() {
  const from = { deliver_policy: DeliverPolicy.LastPerSubject };
  const last = new Map();
  const stream = "KV_weightbus-presence";
  for await (const { said, subject, stored } of messages(stream, `$KV.weightbus-presence.${model}.*`, from, from)) {
    const [, , ofModel, engine] = subject.split(".");
    const state = said ?? { type: "EngineGone", model: ofModel, engine };
    const news = JSON.stringify({ ...state, updated_ns: undefined });
    if (news !== last.get(subject) && (said || last.has(subject))) console.log(JSON.stringify({ stored, ...state }));
    if (said) last.set(subject, news); else last.delete(subject);
  }
}

await Promise.all([
  tell("weightbus-CHECKPOINTS", `weightbus.${model}.checkpoint.>`),
  tell("weightbus-PROGRESS", `weightbus.${model}.>`),
  tellEngines(),
]).catch(fail);
