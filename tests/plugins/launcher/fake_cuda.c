// A libcuda.so.1 for machines without a GPU: tells the test of every image that is loaded and every
// kernel that is launched, and refuses what it is asked to refuse.
#include <stdint.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

typedef int Result;
typedef void (*OnLoad)(void const* image);
typedef int (*OnLaunch)(void* function, unsigned const* sizes, void* stream, void** arguments);

static OnLoad on_load;
static OnLaunch on_launch;
static void* current;
static char refused[64];
static Result reason;
static int num_loads, num_unloads;
static int num_multiprocessors = 1;

PUBLIC void fake_listen(OnLoad load, OnLaunch launch) {
    on_load = load;
    on_launch = launch;
}
PUBLIC void fake_set_context(void* context) { current = context; }
PUBLIC void fake_refuse(char const* call, Result result) {
    strncpy(refused, call, sizeof refused - 1);
    reason = result;
}
PUBLIC void fake_set_multiprocessors(int number) { num_multiprocessors = number; }
PUBLIC int fake_num_loads(void) { return num_loads; }
PUBLIC int fake_num_unloads(void) { return num_unloads; }

#define REFUSED_OR_OK() (strcmp(refused, __func__) == 0 ? reason : 0)

PUBLIC Result cuInit(unsigned flags) { return REFUSED_OR_OK(); }
PUBLIC Result cuGetErrorString(Result result, char const** text) {
    *text = "a reason";
    return 0;
}
PUBLIC Result cuCtxGetCurrent(void** context) {
    *context = current;
    return REFUSED_OR_OK();
}
PUBLIC Result cuCtxPushCurrent_v2(void* context) { return REFUSED_OR_OK(); }
PUBLIC Result cuCtxPopCurrent_v2(void** context) { return REFUSED_OR_OK(); }
PUBLIC Result cuCtxGetDevice(int* device) {
    *device = 3;
    return REFUSED_OR_OK();
}
PUBLIC Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (attribute != 16 || device != 3) {  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        return 1;
    }
    *value = num_multiprocessors;
    return REFUSED_OR_OK();
}
PUBLIC Result cuModuleLoadData(void** module, void const* image) {
    if (REFUSED_OR_OK() != 0) {
        return reason;
    }
    *module = (void*)(intptr_t)(++num_loads);
    on_load(image);
    return 0;
}
PUBLIC Result cuModuleUnload(void* module) {
    ++num_unloads;
    return 0;
}
PUBLIC Result cuModuleGetFunction(void** function, void* module, char const* name) {
    *function = module;
    return REFUSED_OR_OK();
}
PUBLIC Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             void* stream, void** arguments, void** extra) {
    if (REFUSED_OR_OK() != 0) {
        return reason;
    }
    unsigned const sizes[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
    return extra == NULL ? on_launch(function, sizes, stream, arguments) : 1;
}
