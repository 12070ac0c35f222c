// SPDX-License-Identifier: MPL-2.0

// A fake NVIDIA driver with the functions that GstCuda needs to allocate and copy frames. Device
// memory is memory of the process. Rows are padded as on a device.

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 801, DEVICES = 2000, ALIGN = 512 };

typedef struct {
  size_t x, y;
  unsigned kind;
  char *host;
  char *device;
  void *array;
  size_t pitch;
} Side;

typedef struct {
  Side from, to;
  size_t row, rows;
} Copy2D;

static char *start(const Side *side) {
  char *base = side->kind == 1 ? side->host : side->device;
  return base + side->y * side->pitch + side->x;
}

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR"; return SUCCESS; }
int cuGetErrorString(int code, const char **text) { *text = "an error"; return SUCCESS; }

int cuDeviceGetCount(int *count) { *count = DEVICES; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetName(char *name, int len, int device) { strncpy(name, "a fake", len); return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = ALIGN; return SUCCESS; }
int cuDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return SUCCESS; }

int cuCtxCreate_v2(void **context, unsigned flags, int device) { *context = malloc(1); return SUCCESS; }
int cuCtxDestroy_v2(void *context) { free(context); return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) { return SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { return SUCCESS; }
int cuCtxSynchronize(void) { return SUCCESS; }

int cuMemAlloc_v2(char **memory, size_t bytes) { *memory = malloc(bytes); return SUCCESS; }
int cuMemAllocHost_v2(void **memory, size_t bytes) { *memory = malloc(bytes); return SUCCESS; }
int cuMemFree_v2(void *memory) { free(memory); return SUCCESS; }
int cuMemFreeHost(void *memory) { free(memory); return SUCCESS; }
int cuMemAllocPitch_v2(char **memory, size_t *pitch, size_t row, size_t rows, unsigned element) {
  *pitch = (row + ALIGN - 1) / ALIGN * ALIGN;
  *memory = malloc(*pitch * rows);
  return SUCCESS;
}
int cuMemcpy2D_v2(const Copy2D *copy) {
  for (size_t y = 0; y < copy->rows; y++)
    memcpy(start(&copy->to) + y * copy->to.pitch, start(&copy->from) + y * copy->from.pitch, copy->row);
  return SUCCESS;
}
int cuMemcpy2DAsync_v2(const Copy2D *copy, void *stream) { return cuMemcpy2D_v2(copy); }

int cuStreamCreate(void **stream, unsigned flags) { *stream = malloc(1); return SUCCESS; }
int cuStreamDestroy_v2(void *stream) { free(stream); return SUCCESS; }
int cuStreamDestroy(void *stream) { return cuStreamDestroy_v2(stream); }
int cuStreamSynchronize(void *stream) { return SUCCESS; }
int cuEventCreate(void **event, unsigned flags) { *event = malloc(1); return SUCCESS; }
int cuEventDestroy_v2(void *event) { free(event); return SUCCESS; }
int cuEventDestroy(void *event) { return cuEventDestroy_v2(event); }
int cuEventRecord(void *event, void *stream) { return SUCCESS; }
int cuEventSynchronize(void *event) { return SUCCESS; }

// Functions that GstCuda looks up but does not need for frames.
#define NONE(name) int name(void) { return NOT_SUPPORTED; }
NONE(cuCtxEnablePeerAccess)
NONE(cuCtxDisablePeerAccess)
NONE(cuGraphicsMapResources)
NONE(cuGraphicsUnmapResources)
NONE(cuGraphicsUnregisterResource)
NONE(cuGraphicsResourceSetMapFlags)
NONE(cuGraphicsResourceSetMapFlags_v2)
NONE(cuGraphicsSubResourceGetMappedArray)
NONE(cuGraphicsResourceGetMappedPointer)
NONE(cuGraphicsResourceGetMappedPointer_v2)
NONE(cuGraphicsGLRegisterImage)
NONE(cuGraphicsGLRegisterBuffer)
NONE(cuGLGetDevices)
NONE(cuGLGetDevices_v2)
NONE(cuMemcpyDtoD_v2)
NONE(cuMemcpyDtoDAsync_v2)
NONE(cuMemcpyDtoH_v2)
NONE(cuMemcpyDtoHAsync_v2)
NONE(cuMemcpyHtoD_v2)
NONE(cuMemcpyHtoDAsync_v2)
NONE(cuModuleLoadData)
NONE(cuModuleUnload)
NONE(cuModuleGetFunction)
NONE(cuTexObjectCreate)
NONE(cuTexObjectDestroy)
NONE(cuLaunchKernel)
NONE(cuIpcGetEventHandle)
NONE(cuIpcOpenEventHandle)
NONE(cuIpcGetMemHandle)
NONE(cuIpcOpenMemHandle)
NONE(cuIpcOpenMemHandle_v2)
NONE(cuIpcCloseMemHandle)
