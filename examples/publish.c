/* Publishes a checkpoint from C: writes a safetensors file, announces it in MessagePack, waits
 * until the engines have it, and prints what they say (JSON, as all answers to trainers are).
 *
 *   apt-get install gcc libnats-dev && gcc -O2 -Wall -o publish publish.c -lnats
 *   WEIGHTBUS_NATS_URL=nats://HOST:PORT ./publish MODEL VERSION /ABSOLUTE/FILE [SECONDS]
 *
 * Consumers read below their `--root` only. Contract: docs/publish-from-any-language.md. */
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
    char header[4096] = "{", *end = header + 1;
    int bytes = 0;
    for (int i = 0, begin = 0; i < 12; i++, begin = bytes) {
        int is_norm = strstr(names[i], "norm") != NULL;
        bytes += is_norm ? 8 : 16;
        end += sprintf(end, "%s\"%s%s.weight\":{\"dtype\":\"F32\",\"shape\":%s,", i ? "," : "",
            0 < i && i < 10 ? "model.layers.0." : "", names[i], is_norm ? "[2]" : "[2,2]");
        end += sprintf(end, "\"data_offsets\":[%d,%d]}", begin, bytes);
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

static unsigned char out[65536], *next = out; /* MessagePack, as much of it as is needed */
static void byte(int value) { *next++ = (unsigned char)value; }
static void text(const char *s) {
    size_t n = strlen(s);
    must(n <= 4096, s, "longer than 4096");
    byte(0xda), byte(n >> 8), byte(n & 255), memcpy(next, s, n), next += n;
}

int main(int count, char **args) {
    const char *url = getenv("WEIGHTBUS_NATS_URL"), *heard[] = {"round.*.done", "update.*", "dead"};
    must(count > 3 && url, "needed are", "WEIGHTBUS_NATS_URL, MODEL, VERSION and FILE");
    const char *model = args[1], *path = args[3];
    long long version = atoll(args[2]), wait_ms = (count > 4 ? atoll(args[4]) : 60) * 1000;
    write_safetensors(path, version);
    byte(0x86); /* a map of 6 */
    text("type"), text("CheckpointReady"), text("schema_version"), byte(1);
    text("model"), text(model), text("producer"), text("c"), text("version"), byte(0xd3);
    for (int i = 56; i >= 0; i -= 8) byte(version >> i & 255);
    text("files"), byte(0x91), text(path); /* array of 1 */

    char subject[256], id[256], ours[512], mine[64], failed[1024] = "nobody has answered";
    natsConnection *nc = NULL;
    natsSubscription *answers[3];
    natsMsg *message = NULL;
    jsCtx *js = NULL;
    jsPubAck *ack = NULL;
    nats(natsConnection_ConnectTo(&nc, url), url);
    for (int i = 0; i < 3; i++) { /* `weightbus` is the default prefix */
        snprintf(subject, sizeof subject, "weightbus.%s.%s", model, heard[i]);
        nats(natsConnection_SubscribeSync(&answers[i], nc, subject), subject);
    }
    snprintf(subject, sizeof subject, "weightbus.%s.checkpoint.ready", model);
    snprintf(id, sizeof id, "%s/%lld/c", model, version);
    nats(natsConnection_JetStream(&js, nc, NULL), "JetStream");
    nats(natsMsg_Create(&message, subject, NULL, (char *)out, (int)(next - out)), "message");
    nats(natsMsgHeader_Set(message, "Content-Type", "application/msgpack"), "header");
    nats(natsMsgHeader_Set(message, "Nats-Msg-Id", id), "header");
    nats(js_PublishMsg(&ack, js, message, NULL, NULL), "not stored");
    must(!ack->Duplicate, "not stored: a duplicate", id);

    snprintf(ours, sizeof ours, "\"subject\":\"%s\"", subject);
    snprintf(mine, sizeof mine, "\"version\":%lld,", version);
    for (int64_t late = nats_Now() + wait_ms; nats_Now() < late;)
        for (int i = 0; i < 3; i++) {
            if (natsSubscription_NextMsg(&message, answers[i], 20) != NATS_OK) continue;
            const char *json = natsMsg_GetData(message); /* the library ends it with a 0 */
            if (i == 0 && strstr(json, mine)) return puts(json), !strstr(json, "\"failed\":{}");
            if (i == 1 && strstr(json, mine) && strstr(json, "\"UpdateFailed\""))
                snprintf(failed, sizeof failed, "%s", json);
            must(i != 2 || !strstr(json, ours), "dead letter", json);
            natsMsg_Destroy(message);
        }
    must(0, "no round of this version was over in time", failed);
}
