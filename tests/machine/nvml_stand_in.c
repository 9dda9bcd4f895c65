/* Answers NVML calls in place of the driver's library. $NVML_SCENE says what machine it plays:
 *   one       an RTX 4070 that a desktop and another program use
 *   two       that and an RTX 5090
 *   mig       an A100 cut in two slices
 *   none      a driver without a card
 *   old       a GTX 970 with a driver for CUDA 11.4
 *   mute      a card of which the driver tells nothing but that it is there
 *   mismatch  a driver that was updated and not yet loaded anew */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, MISMATCH = 18 };
#define GIB (1ULL << 30)

typedef struct {
    const char *name, *uuid;
    int major, minor, mig;
    unsigned long long total, free;
} Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;

static Device rtx4070 = {"NVIDIA GeForce RTX 4070", "GPU-4070aaaa-0000", 8, 9, 0, 12 * GIB, 9 * GIB};
static Device rtx5090 = {"NVIDIA GeForce RTX 5090", "GPU-5090bbbb-0000", 12, 0, 0, 32 * GIB, 31 * GIB + GIB / 2};
static Device gtx970 = {"NVIDIA GeForce GTX 970", "GPU-0970cccc-0000", 5, 2, 0, 4 * GIB, 4 * GIB};
static Device a100 = {"NVIDIA A100-SXM4-40GB", "GPU-a100dddd-0000", 8, 0, 1, 40 * GIB, 40 * GIB};
static Device slice = {"NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-3g20eeee-0000", 0, 0, 0, 20 * GIB, 19 * GIB};

static int scene(const char *name) {
    const char *played = getenv("NVML_SCENE");
    return played && !strcmp(played, name);
}
static int copy(const char *from, char *to, unsigned size) {
    strncpy(to, from, size);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) { return scene("mismatch") ? MISMATCH : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == MISMATCH ? "Driver/library version mismatch" : "error"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { return copy(scene("old") ? "470.256.02" : "550.54.14", to, size); }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = scene("old") ? 11040 : 12040; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = scene("none") ? 0 : scene("two") ? 2 : 1;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    *device = scene("mig") ? &a100 : scene("old") ? &gtx970 : index ? &rtx5090 : &rtx4070;
    return SUCCESS;
}
int nvmlDeviceGetMigMode(Device *device, unsigned *now, unsigned *next) {
    *now = *next = device->mig;
    return device->mig ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) { *count = 7; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **part) {
    *part = &slice;
    return index < 2 ? SUCCESS : INVALID;
}
int nvmlDeviceGetName(Device *device, char *to, unsigned size) { return scene("mute") ? INVALID : copy(device->name, to, size); }
int nvmlDeviceGetUUID(Device *device, char *to, unsigned size) { return scene("mute") ? INVALID : copy(device->uuid, to, size); }
int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    if (scene("mute")) return NOT_SUPPORTED;
    memory->total = device->total;
    memory->free = device->free;
    memory->used = device->total - device->free;
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return scene("mute") ? INVALID : SUCCESS;
}
#define FIGURE(function, value) \
    int function(Device *device, unsigned *to) { *to = (value); return scene("mute") ? NOT_SUPPORTED : SUCCESS; }
FIGURE(nvmlDeviceGetPowerUsage, 31000)
FIGURE(nvmlDeviceGetEnforcedPowerLimit, device == &gtx970 ? 100000 : 200000)
FIGURE(nvmlDeviceGetPowerManagementDefaultLimit, 200000)
FIGURE(nvmlDeviceGetCurrPcieLinkWidth, device == &gtx970 ? 1 : 16)
FIGURE(nvmlDeviceGetMaxPcieLinkWidth, 16)
int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *to) {
    *to = device == &gtx970 ? 88 : 45;
    return scene("mute") ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetTemperatureThreshold(Device *device, int kind, unsigned *to) { *to = 98; return SUCCESS; }
int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
    rates->gpu = 7;
    return scene("mute") ? NOT_SUPPORTED : SUCCESS;
}
static int list(Device *device, unsigned pid, unsigned long long used, unsigned *count, Process *processes) {
    unsigned room = *count;
    *count = device == &rtx4070 && !scene("mute");
    if (!*count) return SUCCESS;
    if (room < 1) return INSUFFICIENT_SIZE;
    processes[0].pid = pid;
    processes[0].used = used;
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *to) {
    return list(device, 4242, 2 * GIB, count, to);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned *count, Process *to) {
    return list(device, 1111, GIB, count, to);
}
int nvmlSystemGetProcessName(unsigned pid, char *to, unsigned size) {
    return pid == 1111 ? copy("/usr/lib/xorg/Xorg -core", to, size) : INVALID;
}
