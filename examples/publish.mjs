// Publishes a checkpoint from Node.js: writes a safetensors file, announces it, waits until the
// engines have it, and prints what they say.
//
//   npm install @nats-io/transport-node @nats-io/jetstream
//   WEIGHTBUS_NATS_URL=nats://HOST:PORT node publish.mjs MODEL VERSION /ABSOLUTE/FILE [SECONDS]
//
// The engines' consumers read below their `--root` only. The wire contract is
// docs/publish-from-any-language.md.
import { writeFileSync } from "node:fs";
import { jetstream } from "@nats-io/jetstream";
import { connect, headers } from "@nats-io/transport-node";

process.on("uncaughtException", (error) => {
  console.error(`publish.mjs: ${error.message}`);
  process.exit(1);
});
const [model, number, file, seconds = "60"] = process.argv.slice(2);
const servers = process.env.WEIGHTBUS_NATS_URL;
if (!file || !servers) throw new Error("WEIGHTBUS_NATS_URL, MODEL, VERSION and FILE are needed");
const version = Number(number);
if (!/^-?\d+$/.test(number) || !Number.isSafeInteger(version)) throw new Error(`${number}: is no version`);
const at = `weightbus.${model}`; // the default prefix, and the model

/** A safetensors file: 8 bytes length of the header, the header, the tensors back to back. */
function writeSafetensors(path, tensors) {
  const header = {};
  const data = [];
  let end = 0;
  for (const [name, { shape, values }] of Object.entries(tensors)) {
    const bytes = Buffer.alloc(4 * values.length);
    values.forEach((value, i) => bytes.writeFloatLE(value, 4 * i));
    header[name] = { dtype: "F32", shape, data_offsets: [end, (end += bytes.length)] };
    data.push(bytes);
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([length, text, ...data]));
}

const layer = (...names) => names.map((name) => `model.layers.0.${name}`);
const names = [
  "model.embed_tokens",
  ...layer("input_layernorm", ...[..."qkvo"].map((each) => `self_attn.${each}_proj`)),
  ...layer("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
  ...["model.norm", "lm_head"],
];
let count = 0;
const next = () => 1 + ((version + count++) & 127) / 128;
const tensor = (shape) => ({ shape, values: Array.from({ length: 2 ** shape.length }, next) });
const shapeOf = (name) => (name.endsWith("norm") ? [2] : [2, 2]);
writeSafetensors(
  file,
  Object.fromEntries(names.map((name) => [`${name}.weight`, tensor(shapeOf(name))])),
);

const ready = { type: "CheckpointReady", schema_version: 1, model, version, producer: "node" };
const body = JSON.stringify({ ...ready, created_ns: Date.now() * 1e6, files: [file] });
const sent = Buffer.from(body).subarray(0, 1024).toString("base64"); // as a dead letter quotes it

const shown = servers.replace(/\/\/[^@,]*@/g, "//"); // without a password
const nc = await connect({ servers, timeout: 5000 }).catch((error) => {
  throw new Error(`no bus at ${shown}: ${error.message}`);
});
const round = new Promise((resolve, reject) => {
  let failed = `nobody has answered: is a consumer following ${model}?`;
  const refuse = (why) => reject(new Error(why));
  const hear = (where, then) =>
    nc.subscribe(where, { callback: (error, m) => (error ? reject(error) : then(m.json())) });
  hear(`${at}.round.*.done`, (said) => said.version === version && resolve(said));
  hear(`${at}.update.*`, (said) => {
    if (said.type !== "UpdateFailed" || said.version !== version) return;
    failed = said.reason;
    if (said.cause === "VersionNotNew") refuse(`not new: ${failed}`);
  });
  hear(`${at}.dead`, (said) => said.payload === sent && refuse(`dead letter: ${said.reason}`));
  const late = `no round of version ${version} was over within ${seconds} s`;
  nc.closed().then((error) => refuse(`the connection is closed: ${error?.message ?? ""}`));
  setTimeout(() => refuse(`${late}: ${failed}`), 1000 * Number(seconds)).unref();
});

const id = `${model}/${version}/node`;
const told = headers();
told.set("Content-Type", "application/json");
told.set("Nats-Msg-Id", id);
const stored = jetstream(nc).publish(`${at}.checkpoint.ready`, body, { headers: told });
const isNew = stored.then((ack) => {
  if (ack.duplicate) throw new Error(`not stored: ${id} is a duplicate`);
});
const [said] = await Promise.all([round, isNew]);
console.log(JSON.stringify(said));
process.exitCode = Object.keys(said.failed).length ? 1 : 0;
await nc.close();
