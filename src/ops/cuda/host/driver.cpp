// A stand-in for the NVIDIA driver, for tests of the code between the engine and the driver. Its
// device is in CPU memory and completes every call at once. Kernels of the source are found by
// name. TADSR_DRIVER_VERSION in the environment sets its version.
#include "host.cpp"

#include <map>
#include <string>

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600 };

struct Side {
    size_t x, y;
    unsigned kind;
    char *host, *device;
    void *array;
    size_t pitch;
};
struct Copy2D {
    Side from, to;
    size_t row, rows;
};

struct Kernel {
    std::string name;
    size_t bytes;
};
struct Node {
    const Kernel *kernel;
    uint32_t grid[3], block[3], shared;
    void **params, **extra;
    void *kern, *context;
};
static_assert(sizeof(Copy2D) == 128 && sizeof(Node) == 72, "as in cuda.h");

struct Launch {
    const Kernel *kernel;
    uint32_t grid[3], block[3];
    std::vector<uint64_t> params;
};
using Graph = std::vector<Launch>;

const Kernel kernels[] = {
    {"tadsr_unpack_tiles", sizeof(student::Frame)}, {"tadsr_unpack", sizeof(student::Frame)},
    {"tadsr_conv8", sizeof(student::Conv)},         {"tadsr_conv16", sizeof(student::Conv)},
    {"tadsr_conv32", sizeof(student::Conv)},        {"tadsr_conv64", sizeof(student::Conv)},
    {"tadsr_conv16_of4", sizeof(student::Conv)},    {"tadsr_conv32_of4", sizeof(student::Conv)},
    {"tadsr_pack_tiles", sizeof(student::Frame)},   {"tadsr_pack", sizeof(student::Frame)},
    {"direct", sizeof(candidates::Layer)},          {"row16", sizeof(candidates::Layer)},
    {"row32", sizeof(candidates::Layer)},           {"fused16", sizeof(candidates::Layer)}};

// Memory of the device, and the thread's number of pushed contexts. Calls without a context fail.
thread_local int pushed;
std::atomic<size_t> allocated;

int within(int code) { return pushed > 0 ? code : 201; }

// Every second query finds work in progress.
int queried() {
    static std::atomic<unsigned> queries;
    return within(queries++ % 2 ? SUCCESS : NOT_READY);
}

template <typename T> int made(T **out, T *value) {
    *out = value;
    return within(SUCCESS);
}

} // namespace

extern "C" {

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuDriverGetVersion(int *version) {
    const char *given = std::getenv("TADSR_DRIVER_VERSION");
    *version = given ? std::atoi(given) : 13000;
    return SUCCESS;
}
int cuGetErrorName(int, const char **text) { return *text = "CUDA_ERROR", SUCCESS; }
int cuGetErrorString(int, const char **text) { return *text = "an error", SUCCESS; }

int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { return *device = 40 + ordinal, ordinal == 0 ? SUCCESS : 101; }
int cuDeviceGetName(char *name, int len, int) { return std::snprintf(name, len, "a stand-in"), SUCCESS; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = 1 << 30, SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : attribute == 16 ? 2 : -1;
    return *value < 0 ? INVALID_VALUE : SUCCESS;
}
int cuDeviceGetUuid_v2(char *uuid, int device) { return std::memset(uuid, device, 16), SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)0x1000, device == 40 ? SUCCESS : 101; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device == 40 ? SUCCESS : 101; }
int cuCtxPushCurrent_v2(void *context) { return ++pushed, context == (void *)0x1000 ? SUCCESS : 201; }
int cuCtxPopCurrent_v2(void **) { return pushed-- > 0 ? SUCCESS : 201; }

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = 1 << 30;
    *free = *total - allocated;
    return within(SUCCESS);
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    if (!bytes || pushed <= 0) {
        return INVALID_VALUE;
    }
    if (allocated + bytes > 1 << 30) {
        return OUT_OF_MEMORY;
    }
    allocated += bytes;
    // The size is stored in front. The alignment is that of a device.
    char *memory = (char *)std::aligned_alloc(256, (bytes + 511) / 256 * 256);
    std::memcpy(memory, &bytes, 8);
    std::memset(memory + 256, 0xff, bytes);
    *address = (uint64_t)(memory + 256);
    return SUCCESS;
}
int cuMemFree_v2(uint64_t address) {
    char *memory = (char *)address - 256;
    size_t bytes;
    std::memcpy(&bytes, memory, 8);
    allocated -= bytes;
    std::free(memory);
    return within(SUCCESS);
}
int cuMemHostAlloc(void **memory, size_t bytes, unsigned) { return made(memory, std::malloc(bytes)); }
int cuMemFreeHost(void *memory) { return std::free(memory), within(SUCCESS); }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
    return std::memcpy((void *)to, from, bytes), within(SUCCESS);
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
    return std::memcpy(to, (void *)from, bytes), within(SUCCESS);
}
int cuMemcpy2DAsync_v2(const Copy2D *copy, void *) {
    const auto valid = [&](const Side &side) { return (side.kind == 1 || side.kind == 2) && copy->row <= side.pitch; };
    if (!valid(copy->from) || !valid(copy->to)) {
        return INVALID_VALUE;
    }
    const auto at = [](const Side &side, size_t y) {
        return (side.kind == 1 ? side.host : side.device) + (side.y + y) * side.pitch + side.x;
    };
    for (size_t y = 0; y < copy->rows; ++y) {
        std::memcpy(at(copy->to, y), at(copy->from, y), copy->row);
    }
    return within(SUCCESS);
}

int cuStreamCreate(void **stream, unsigned) { return made(stream, std::malloc(1)); }
int cuStreamDestroy_v2(void *stream) { return std::free(stream), within(SUCCESS); }
int cuStreamQuery(void *) { return queried(); }
int cuStreamWaitEvent(void *, void *event, unsigned flags) { return event && !flags ? within(SUCCESS) : INVALID_VALUE; }
int cuEventCreate(void **event, unsigned) { return made(event, std::malloc(1)); }
int cuEventDestroy_v2(void *event) { return std::free(event), within(SUCCESS); }
int cuEventRecord(void *event, void *) { return event ? within(SUCCESS) : INVALID_VALUE; }
int cuEventQuery(void *event) { return event ? queried() : INVALID_VALUE; }
int cuEventElapsedTime(float *time, void *, void *) { return *time = 1.0f, within(SUCCESS); }

// Machine code is an ELF file of NVIDIA, PTX is text. TADSR_DRIVER_OTHER_CHIP in the environment
// makes the machine code that of another chip.
int cuModuleLoadData(void **module, const void *image) {
    const auto *bytes = (const unsigned char *)image;
    const bool cubin = !std::memcmp(bytes, "\x7f" "ELF", 4) && bytes[18] == 190 && bytes[19] == 0;
    if (cubin && std::getenv("TADSR_DRIVER_OTHER_CHIP")) {
        return 209;
    }
    return cubin || std::strstr((const char *)bytes, ".target sm_80") ? made(module, std::malloc(1)) : 200;
}
int cuModuleUnload(void *module) { return std::free(module), within(SUCCESS); }
int cuModuleGetFunction(const Kernel **function, void *, const char *name) {
    for (const Kernel &kernel : kernels) {
        if (kernel.name == name) {
            return made(function, &kernel);
        }
    }
    return NOT_FOUND;
}

int cuGraphCreate(Graph **graph, unsigned) { return made(graph, new Graph); }
int cuGraphAddKernelNode_v2(void **node, Graph *graph, void *const *before, size_t count, const Node *params) {
    // Each node depends on the previous one. Its handle is its index in the graph.
    const bool chained = count == !graph->empty() && (!count || (size_t)*before == graph->size());
    if (!chained || params->shared || params->extra || params->kern || params->context) {
        return INVALID_VALUE;
    }
    Launch launch{params->kernel, {}, {}, {}};
    std::memcpy(launch.grid, params->grid, sizeof launch.grid);
    std::memcpy(launch.block, params->block, sizeof launch.block);
    const auto *words = (const uint64_t *)params->params[0];
    launch.params.assign(words, words + params->kernel->bytes / 8);
    graph->push_back(launch);
    *node = (void *)graph->size();
    return within(SUCCESS);
}
int cuGraphInstantiateWithFlags(Graph **exec, const Graph *graph, uint64_t) { return made(exec, new Graph(*graph)); }
int cuGraphUpload(Graph *, void *) { return within(SUCCESS); }
// With TADSR_DRIVER_DEFECTIVE in the environment, convolutions clamp negative results to 0.
int cuGraphLaunch(const Graph *exec, void *) {
    for (Launch launch : *exec) {
        if (std::getenv("TADSR_DRIVER_DEFECTIVE") && launch.kernel->bytes == sizeof(student::Conv)) {
            ((student::Conv *)launch.params.data())->slope = 0.0f;
        }
        if (!tadsr_launch(launch.kernel->name.c_str(), launch.grid, launch.block, launch.params.data(), false)) {
            return NOT_FOUND;
        }
    }
    return within(SUCCESS);
}
int cuGraphDestroy(Graph *graph) { return delete graph, within(SUCCESS); }
int cuGraphExecDestroy(Graph *exec) { return delete exec, within(SUCCESS); }

// Returns the allocated bytes of the device.
size_t tadsr_allocated() { return allocated; }
}
