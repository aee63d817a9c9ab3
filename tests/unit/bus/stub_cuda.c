/* A libcuda over ordinary memory, to hold the signatures of weightbus.bus.cuda_driver to cuda.h.
   Built by test_cuda_driver.py. Whoever calls what works on a device without a current context is
   told so (201), as by a driver. */
#include <stdlib.h>
#include <string.h>

typedef struct { char reserved[64]; } Handle;
typedef unsigned long long Address;

static int count = 2, busy, pushed, opened;
static void *current[16];
static int retained[8];

static int no_context(void) { return pushed ? 0 : 201; }

void stub_set(int devices, int stream_is_busy) { count = devices; busy = stream_is_busy; }
int stub_retained(int device) { return retained[device]; }
int stub_pushed(void) { return pushed; }
int stub_opened(void) { return opened; }

int cuInit(unsigned flags) { return flags ? 1 : count ? 0 : 100; }
int cuGetErrorName(int code, const char **text) {
    *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : 0;
    return *text ? 0 : 1;
}
int cuGetErrorString(int code, const char **text) {
    *text = code == 2 ? "out of memory" : 0;
    return *text ? 0 : 1;
}
int cuDeviceGetCount(int *found) { *found = count; return 0; }
int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= count) return 101;
    *device = ordinal;
    return 0;
}
int cuDeviceGetUuid(unsigned char *uuid, int device) { memset(uuid, device + 1, 16); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    memset(uuid, device == 1 ? 0xab : device + 1, 16); /* device 1 is an instance of MIG */
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 91 || (attribute == 113 && device == 0);
    return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = retained[device] > 0;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &retained[device];
    retained[device]++;
    return 0;
}
int cuCtxPushCurrent_v2(void *context) { current[pushed++] = context; return 0; }
int cuCtxPopCurrent_v2(void **context) {
    if (!pushed) return 201;
    *context = current[--pushed];
    return 0;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    *free_bytes = 5ull << 32;
    *total = 6ull << 32;
    return no_context();
}
int cuMemAlloc_v2(Address *address, size_t size) {
    if (size > 1u << 30) return 2;
    *address = (Address)aligned_alloc(4096, size);
    return no_context();
}
int cuMemFree_v2(Address address) { free((void *)address); return no_context(); }
int cuMemGetAddressRange_v2(Address *base, size_t *size, Address address) {
    *base = address & ~4095ull;
    *size = 8192;
    return no_context();
}
int cuIpcGetMemHandle(Handle *handle, Address address) {
    memset(handle, 0x5a, sizeof *handle);
    memcpy(handle->reserved + 56, &address, 8);
    return no_context();
}
int cuIpcOpenMemHandle_v2(Address *address, Handle handle, unsigned flags) {
    for (int i = 0; i < 56; i++)
        if (handle.reserved[i] != 0x5b) return 1; /* by value, whole, and not our own */
    memcpy(address, handle.reserved + 56, 8);
    opened++;
    return flags == 1 ? no_context() : 1;
}
int cuIpcCloseMemHandle(Address address) { opened--; return address ? no_context() : 1; }
int cuMemHostRegister_v2(void *p, size_t size, unsigned flags) {
    return p && size > 1ull << 32 && (flags == 3 || flags == 11) ? no_context() : 1;
}
int cuMemHostUnregister(void *p) { return p ? no_context() : 1; }
int cuMemcpyAsync(Address to, Address from, size_t size, void *stream) {
    memcpy((void *)to, (void *)from, size);
    return stream == (void *)0x77 || !stream ? no_context() : 1;
}
int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return stream == (void *)0x77 ? no_context() : 1;
}
int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return stream == (void *)0x77 ? no_context() : 1;
}
int cuStreamCreate(void **stream, unsigned flags) {
    *stream = (void *)0x77;
    return flags == 1 ? no_context() : 1;
}
int cuStreamDestroy_v2(void *stream) { return stream == (void *)0x77 ? no_context() : 1; }
int cuStreamQuery(void *stream) { return busy ? 600 : no_context(); }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    return event == (void *)0x88 && !flags ? no_context() : 1;
}
int cuEventCreate(void **event, unsigned flags) {
    *event = (void *)0x88;
    return flags == 2 ? no_context() : 1;
}
int cuEventRecord(void *event, void *stream) {
    return event == (void *)0x88 && stream == (void *)0x77 ? no_context() : 1;
}
int cuEventQuery(void *event) { return busy ? 600 : event == (void *)0x88 ? no_context() : 1; }
int cuEventDestroy_v2(void *event) { return event == (void *)0x88 ? no_context() : 1; }
