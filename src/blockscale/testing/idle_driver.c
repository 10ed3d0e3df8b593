/* A CUDA driver of one GPU that does nothing: what host code costs and what it launches can be seen
   without a GPU. Built and loaded by idle_gpu.py. */
#include <stdint.h>
#include <string.h>

static uint64_t launched;
static uint64_t encoded;

uint64_t idle_launches(void) { return launched; }
uint64_t idle_descriptors(void) { return encoded; }

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  launched++;
  return 0;
}

int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                           int interleave, int swizzle, int promotion, int fill) {
  uint64_t words[16] = {type, rank, (uint64_t)address, swizzle, promotion};
  memcpy(words + 5, sizes, rank * 8);
  memcpy(map, words, sizeof words);
  encoded++;
  return 0;
}

int cuGetErrorString(int code, const char **text) {
  *text = "the idle driver";
  return 0;
}

static int set(void *place, uint64_t value, int bytes) {
  memcpy(place, &value, bytes);
  return 0;
}

/* Shared memory and registers as of a GPU that takes every kernel. */
int cuDeviceGetAttribute(int *value, int attribute, int device) { return set(value, 232448, 4); }
/* Attribute 0: threads of a block (CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, cuda.h). */
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  return set(value, attribute == 0 ? 1024 : 0, 4);
}
int cuDeviceGet(int *device, int ordinal) { return set(device, 0, 4); }
int cuCtxGetCurrent(void **context) { return set(context, 1, 8); }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return set(context, 1, 8); }
int cuModuleLoadData(void **module, const void *image) { return set(module, 1, 8); }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  return set(function, 1, 8);
}
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) {
  return set(clusters, 1, 4);
}
int cuCtxGetLimit(uint64_t *value, int limit) { return set(value, 0, 8); }
int cuCtxSetLimit(int limit, uint64_t value) { return 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) {
  return set(value, pointer, 8);
}
