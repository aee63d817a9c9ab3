/* A libnccl over files, for several processes, to hold the signatures of weightbus.bus.nccl to
   nccl.h and its behaviour to non-blocking communicators. Built by tests/nccl_stub.py.

   As strict as NCCL: a communicator that is in progress takes nothing but an abort; the first
   operation connects the members; a member that is lost is not noticed. Stricter: every call that
   works on a device must be made with a device current, as `stub_enter` tells.
   Device memory is memory of the process; a stream is a number, done when `stub_pending` says 0. */
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK, CUDA_ERROR, SYSTEM_ERROR, INTERNAL, INVALID_ARGUMENT, INVALID_USAGE, REMOTE, PROGRESS };
#define OPERATIONS 4096

typedef struct { char internal[128]; } Id;
typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cga, min_ctas, max_ctas;
    const char *net;
    int split_share;
} Config;
typedef struct { char *memory; size_t count; int root; void *stream; } Operation;
typedef struct {
    char path[128];
    int place, size, done;
    Operation operations[OPERATIONS];
    atomic_int state, fault, queued, aborted;
    pthread_t thread;
} Comm;

static int version = 22809, refusal, refused_code, slow_ms;
static char refused[64], last[128];
static atomic_int communicators, aborts;
static atomic_long pending[1 << 16];
static _Thread_local int current = -1;

/* What a test says: code is what the named call answers next; "what is begun" is what it comes to. */
void stub_version(int code) { version = code; }
void stub_refuse(const char *call, int code, const char *text) {
    snprintf(refused, sizeof refused, "%s", call);
    snprintf(last, sizeof last, "%s", text);
    refused_code = code;
    refusal = 1;
}
void stub_slow(int ms) { slow_ms = ms; }
void stub_enter(int device) { current = device; } /* -1: none */
int stub_communicators(void) { return communicators; }
int stub_aborts(void) { return aborts; }
long stub_pending(long stream) { return pending[stream & 0xffff]; }

static int refuses(const char *call) {
    if (!refusal || strcmp(call, refused)) return 0;
    refusal = 0;
    return refused_code;
}

static int exists(Comm *comm, const char *kind, int number, int place) {
    char name[256];
    snprintf(name, sizeof name, "%s.%s.%d.%d", comm->path, kind, number, place);
    return access(name, F_OK) == 0;
}
static void put(Comm *comm, const char *kind, int number, int place, const void *data, size_t count) {
    char name[256], made[300];
    snprintf(name, sizeof name, "%s.%s.%d.%d", comm->path, kind, number, place);
    snprintf(made, sizeof made, "%s.new.%d", name, comm->place);
    FILE *file = fopen(made, "wb");
    if (!file) abort();
    if (count && fwrite(data, 1, count, file) != count) abort();
    fclose(file);
    rename(made, name); /* whole, or not there */
}
static int wait_for(Comm *comm, const char *kind, int number, int place) {
    while (!exists(comm, kind, number, place)) {
        if (comm->aborted) return 0;
        usleep(200);
    }
    return 1;
}
static int meet(Comm *comm, const char *kind) {
    put(comm, kind, 0, comm->place, 0, 0);
    for (int place = 0; place < comm->size; place++)
        if (!wait_for(comm, kind, 0, place)) return 0;
    return 1;
}
static int move(Comm *comm, int number) {
    Operation *one = &comm->operations[number];
    if (comm->place == one->root) {
        put(comm, "data", number, 0, one->memory, one->count);
        for (int place = 0; place < comm->size; place++)
            if (place != one->root && !wait_for(comm, "taken", number, place)) return 0;
        return 1;
    }
    if (!wait_for(comm, "data", number, 0)) return 0;
    char name[256];
    snprintf(name, sizeof name, "%s.data.%d.0", comm->path, number);
    FILE *file = fopen(name, "rb");
    if (!file || fread(one->memory, 1, one->count, file) != one->count) abort();
    fclose(file);
    put(comm, "taken", number, comm->place, 0, 0);
    return 1;
}

static void *run(void *argument) {
    Comm *comm = argument;
    int code = refuses("what is begun");
    if (code) comm->fault = code;
    else if (!meet(comm, "formed")) return 0;
    comm->state = OK;
    while (!comm->aborted) {
        if (comm->done == comm->queued || comm->fault) {
            if (!comm->fault) comm->fault = refuses("what runs");
            usleep(200);
            continue;
        }
        if (comm->done == 0 && !meet(comm, "connected")) return 0;
        usleep(1000 * slow_ms);
        comm->state = OK; /* it is in the stream now */
        if (!move(comm, comm->done)) return 0;
        pending[(long)comm->operations[comm->done++].stream & 0xffff]--;
    }
    return 0;
}

int ncclGetVersion(int *found) { *found = version; return OK; }
const char *ncclGetErrorString(int code) {
    return code == REMOTE ? "remote process exited or there was a network error"
         : code == INVALID_USAGE ? "invalid usage" : code == CUDA_ERROR ? "unhandled cuda error"
         : code == INVALID_ARGUMENT ? "invalid argument" : "unknown result code";
}
const char *ncclGetLastError(Comm *comm) { return comm ? 0 : last; }

int ncclGetUniqueId(Id *id) {
    int code = refuses("ncclGetUniqueId");
    if (code) return code;
    memset(id, 0, sizeof *id);
    const char *folder = getenv("STUB_NCCL_FOLDER");
    snprintf(id->internal, sizeof id->internal, "%s/nccl-XXXXXX", folder ? folder : "/tmp");
    int fd = mkstemp(id->internal);
    if (fd < 0) return SYSTEM_ERROR;
    close(fd);
    return OK;
}

int ncclCommInitRankConfig(Comm **made, int size, Id id, int place, Config *config) {
    int code = refuses("ncclCommInitRankConfig");
    *made = 0;
    if (code) return code;
    if (current < 0) return CUDA_ERROR;
    if (config->size != 48 || sizeof *config != 48 || config->magic != 0xcafebeef) return INVALID_ARGUMENT;
    if (config->version != 21800 || config->blocking != 0) return INVALID_ARGUMENT;
    if (config->cga != INT_MIN || config->min_ctas != INT_MIN || config->max_ctas < 1) return INVALID_ARGUMENT;
    if (config->net || config->split_share != INT_MIN) return INVALID_ARGUMENT;
    if (place < 0 || place >= size || access(id.internal, F_OK)) return INVALID_ARGUMENT;
    Comm *comm = calloc(1, sizeof *comm);
    memcpy(comm->path, id.internal, sizeof comm->path);
    comm->place = place, comm->size = size, comm->state = PROGRESS;
    communicators++;
    pthread_create(&comm->thread, 0, run, comm);
    *made = comm;
    code = refuses("the end of ncclCommInitRankConfig");
    return code ? code : PROGRESS;
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    int code = refuses("ncclCommGetAsyncError");
    if (code) return code;
    *state = comm->fault ? comm->fault : comm->state;
    return OK;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
    int code = refuses("ncclBroadcast");
    if (code) return code;
    if (current < 0) return CUDA_ERROR;
    if (comm->state == PROGRESS) return INVALID_USAGE;
    if (from != to || type != 1 || root < 0 || root >= comm->size) return INVALID_ARGUMENT;
    if (comm->queued == OPERATIONS) return INTERNAL;
    Operation one = {to, count, root, stream};
    comm->operations[comm->queued] = one;
    comm->state = PROGRESS;
    pending[(long)stream & 0xffff]++;
    comm->queued++;
    return PROGRESS;
}

#ifndef WITHOUT_ABORT
int ncclCommAbort(Comm *comm) {
    if (current < 0) return CUDA_ERROR;
    comm->aborted = 1;
    pthread_join(comm->thread, 0);
    while (comm->done < comm->queued) pending[(long)comm->operations[comm->done++].stream & 0xffff]--;
    usleep(1000 * slow_ms);
    communicators--;
    aborts++;
    free(comm);
    return refuses("ncclCommAbort");
}
#endif
