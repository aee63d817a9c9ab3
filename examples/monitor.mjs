// Watches Weight bus from Node.js: prints what happens as one JSON object per line, until Ctrl-C.
//
//   npm install @nats-io/transport-node @nats-io/jetstream @msgpack/msgpack
//   WEIGHTBUS_NATS_URL=nats://HOST:PORT node monitor.mjs [MODEL] [--since 10m | --from-version N]
//
// It only reads: no update waits for it, however slow it is. What is said: docs/messages.md.
import { decode } from "@msgpack/msgpack";
import { DeliverPolicy, jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect, Match } from "@nats-io/transport-node";
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

/** The messages of a stream in their order, also those of the time when the connection was lost. */
async function* messages(/** @type {string} */ stream, /** @type {string} */ subject, /** @type {object} */ from) {
  const options = { filter_subjects: [subject], ...from };
  const consumer = await jetstream(nc).consumers.get(stream, options);
  for await (const m of await consumer.consume({ max_messages: 256, expires: 5000 })) {
    const isJson = m.headers?.get("Content-Type", Match.IgnoreCase) === "application/json";
    try {
      const said = m.data.length ? /** @type {Message} */ (isJson ? m.json() : decode(m.data)) : undefined;
      yield { said, subject: m.subject, stored: m.time.toISOString() };
    } catch (error) {
      console.error(`monitor.mjs: ${m.subject} cannot be read: ${error}`);
    }
  }
}

async function tell(/** @type {string} */ stream, /** @type {string} */ subject) {
  const from = { deliver_policy: DeliverPolicy.StartSequence, opt_start_seq: await beginning(stream) };
  for await (const { said, stored } of messages(stream, subject, from))
    if (said && (said.version ?? fromVersion) >= fromVersion)
      console.log(JSON.stringify(/** @type {Event} */ ({ stored, ...said })));
}

/** Heartbeats, when they say something new; no value: the engine is gone. */
async function tellEngines() {
  const from = { deliver_policy: DeliverPolicy.LastPerSubject };
  const last = new Map();
  const stream = "KV_weightbus-presence";
  for await (const { said, subject, stored } of messages(stream, `$KV.weightbus-presence.${model}.*`, from)) {
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
