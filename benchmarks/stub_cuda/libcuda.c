/* A CUDA driver that does nothing, successfully: what triton's own driver and launcher call (3.6 to 3.9), and no more.
   It counts launches. Handles that are asked for are made up; they are never looked into. */
#include <stddef.h>
#include <string.h>

typedef int Result; /* 0 is CUDA_SUCCESS */
typedef void *Handle;

static long launched;
long stub_launches(void) { return launched; }
Result cuLaunchKernelEx(const void *config, Handle function, void **arguments, void **extra) { launched++; return 0; }

/* The device: an H100's multiprocessors and shared memory, compute capability 9.0. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 16: *value = 132; break;    /* multiprocessors */
  case 75: *value = 9; break;      /* compute capability, major */
  case 76: *value = 0; break;      /* and minor */
  case 97: *value = 232448; break; /* shared memory of a block that opts in */
  default: *value = 1024;
  }
  return 0;
}
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDevicePrimaryCtxRetain(Handle *context, int device) { *context = (Handle)1; return 0; }
Result cuCtxGetCurrent(Handle *context) { *context = (Handle)1; return 0; }
Result cuCtxSetCurrent(Handle context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }

/* Kernels: loaded, and reported to take no stack and 32 registers. */
Result cuModuleLoadData(Handle *module, const void *image) { *module = (Handle)2; return 0; }
Result cuModuleUnload(Handle module) { return 0; }
Result cuModuleGetFunction(Handle *function, Handle module, const char *name) { *function = (Handle)3; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, Handle function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers, sizes in bytes */
  return 0;
}
Result cuFuncSetAttribute(Handle function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(Handle function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *clusters, Handle function, const void *config) { *clusters = 1; return 0; }

/* Memory and streams: every address is the device's, nothing is captured. */
Result cuPointerGetAttribute(void *data, int attribute, unsigned long long address) {
  memcpy(data, &address, sizeof address);
  return 0;
}
Result cuPointerGetAttributes(unsigned count, int *attributes, void **data, unsigned long long address) { return 0; }
Result cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }
Result cuTensorMapEncodeTiled(void) { return 801; } /* not supported: no kernel here asks for tensor maps */
Result cuTensorMapEncodeIm2col(void) { return 801; }
Result cuGetErrorString(Result error, const char **text) { *text = "the stub driver does not do this"; return 0; }
