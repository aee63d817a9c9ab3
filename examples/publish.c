/* Publishes a checkpoint from C: writes a safetensors file, announces it in MessagePack, waits
 * until the engines have it, and prints what they say (JSON, as all answers to trainers are).
 *
 *   apt-get install gcc libnats-dev && gcc -O2 -Wall -o publish publish.c -lnats
 *   WEIGHTBUS_NATS_URL=nats://HOST:PORT ./publish MODEL VERSION /ABSOLUTE/FILE [SECONDS]
 *
 * Consumers read below their `--root` only. Contract: docs/publish-from-any-language.md. */
#include <errno.h>
#include <nats/nats.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void must(int ok, const char *what, const char *why) {
    if (!ok) fprintf(stderr, "publish: %s: %s\n", what, why), exit(1);
}
static void nats(natsStatus status, const char *what) {
    must(status == NATS_OK, what, natsStatus_GetText(status));
}

/* A safetensors file: 8 bytes length of the header, the header, the tensors back to back. */
static void write_safetensors(const char *path, long long version) {
    const char *names[] = {"model.embed_tokens", "input_layernorm", "self_attn.q_proj",
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "post_attention_layernorm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "model.norm", "lm_head"};
    char header[4096], *end = header;
    int bytes = 0;
    for (int i = 0, begin = 0; i < 12; i++, begin = bytes) {
        const char *in = 0 < i && i < 10 ? "model.layers.0." : "", *norm = strstr(names[i], "norm");
        bytes += norm ? 8 : 16;
        end += sprintf(end, "%c\"%s%s.weight\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":"
            "[%d,%d]}", i ? ',' : '{', in, names[i], norm ? "2" : "2,2", begin, bytes);
    }
    *end++ = '}';
    FILE *file = fopen(path, "wb");
    must(file != NULL, path, "cannot be written");
    for (int i = 0; i < 64; i += 8) fputc((int)((long long)(end - header) >> i & 255), file);
    fwrite(header, 1, end - header, file);
    for (int i = 0; i < bytes / 4; i++) /* 1 + n / 128, as an F32 */
        fwrite((unsigned char[]){0, 0, 128 | ((version + i) & 127), 0x3f}, 1, 4, file);
    must(!(ferror(file) | fclose(file)), path, "cannot be written");
}

static char out[65536], *next = out; /* MessagePack, as much of it as is needed */
static void put(int tag, long long value, int bytes) {
    for (*next++ = (char)tag; bytes--;) *next++ = (char)(value >> 8 * bytes & 255);
}
static void text(const char *s) {
    must(strlen(s) <= 4096, s, "longer than 4096");
    put(0xda, strlen(s), 2), next = stpcpy(next, s);
}

int main(int count, char **args) {
    const char *url = getenv("WEIGHTBUS_NATS_URL");
    must(count > 3 && url, "needed are", "WEIGHTBUS_NATS_URL, MODEL, VERSION and FILE");
    const char *model = args[1], *path = args[3];
    char *rest;
    long long version = strtoll(args[2], &rest, 10);
    must(!errno && *args[2] && !*rest, args[2], "is no version");
    long long wait_ms = (count > 4 ? atoll(args[4]) : 60) * 1000;
    write_safetensors(path, version);
    put(0x87, 0, 0), text("type"), text("CheckpointReady"), text("schema_version"), put(1, 0, 0);
    text("model"), text(model), text("producer"), text("c"), text("version"), put(0xd3, version, 8);
    text("created_ns"), put(0xd3, nats_NowInNanoSeconds(), 8);
    text("files"), put(0x91, 0, 0), text(path); /* an array of 1, in a map of 7 */

    natsConnection *nc; natsSubscription *answers; natsMsg *message; jsCtx *js; jsPubAck *ack;
    char subject[256], id[256], ours[64], mine[64], failed[1024] = "nobody has answered";
    jsPubOptions options = {.MsgId = id}; /* no Content-Type means MessagePack */
    snprintf(id, sizeof id, "%s/%lld/c", model, version);
    snprintf(ours, sizeof ours, "\"payload_bytes\":%d,", (int)(next - out));
    snprintf(mine, sizeof mine, "\"version\":%lld,", version);
    nats(natsConnection_ConnectTo(&nc, url), url);
    snprintf(subject, sizeof subject, "weightbus.%s.>", model); /* the default prefix, all of it */
    nats(natsConnection_SubscribeSync(&answers, nc, subject), subject);
    snprintf(subject, sizeof subject, "weightbus.%s.checkpoint.ready", model);
    nats(natsConnection_JetStream(&js, nc, NULL), "JetStream");
    nats(js_Publish(&ack, js, subject, out, (int)(next - out), &options, NULL), "not stored");
    must(!ack->Duplicate, "not stored: a duplicate", id);

    for (int64_t late = nats_Now() + wait_ms;; natsMsg_Destroy(message)) {
        natsStatus status = natsSubscription_NextMsg(&message, answers, late - nats_Now());
        must(status != NATS_TIMEOUT, "no round of this version was over in time", failed);
        nats(status, "the connection is closed");
        const char *json = natsMsg_GetData(message); /* the library ends it with a 0 */
        must(!strstr(json, "\"DeadLetter\"") || !strstr(json, ours), "dead letter", json);
        if (!strstr(json, mine)) continue;
        if (strstr(json, "\"RoundComplete\"")) return puts(json), !strstr(json, "\"failed\":{}");
        if (strstr(json, "\"UpdateFailed\"")) snprintf(failed, sizeof failed, "%s", json);
        must(!strstr(json, "\"cause\":\"VersionNotNew\""), "not new", json);
    }
}
