// A make-believe libcuda: the functions of the driver that the runtime calls, on kernels that nvrtc.cpp made.
//
// Work on a stream is carried out late, when something waits for it and by the thread that does, so that a missing wait
// shows; a copy from memory of the host that is not pinned takes its bytes at once, as the real driver does. Memory of
// the device lies between pages that may not be touched. While a stream captures, what the real driver forbids is an
// error.
#include "gpu.h"

#define DRIVER extern "C" __attribute__((visibility("default"))) int

// ---- the device

DRIVER cuInit(unsigned) {
    emu::catch_bad_addresses();
    return SUCCESS;
}

DRIVER cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

DRIVER cuDeviceGetCount(int* count) {
    *count = N_DEVICES;
    return SUCCESS;
}

DRIVER cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < N_DEVICES ? SUCCESS : INVALID_DEVICE;
}

DRIVER cuDeviceGetName(char* name, int len, int device) {
    snprintf(name, (size_t)len, "%s", devices[device].name);
    return SUCCESS;
}

DRIVER cuDeviceGetUuid_v2(void* uuid, int) {
    memset(uuid, 0, 16);
    return SUCCESS;
}

DRIVER cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = TOTAL_MEMORY;
    return SUCCESS;
}

DRIVER cuDeviceGetAttribute(int* value, int attribute, int device) {
    static const std::map<int, int> VALUES = {
        {1, 1024},              // threads of a block
        {2, 1024}, {3, 1024}, {4, 64}, // along x, y, z
        {5, 2147483647}, {6, 65535}, {7, 65535}, // blocks along x, y, z
        {8, 48 << 10},          // shared memory of a block, unless asked for
        {9, 64 << 10},          // constant memory
        {10, 32},               // threads of a warp
        {12, 65536},            // registers of a block
        {13, 1000000},          // clock, kHz
        {36, 1000000}, {37, 4096}, // memory: clock, kHz; bits wide
        {38, 4 << 20},          // L2 cache
        {39, 2048},             // threads of a multiprocessor
        {41, 1},                // unified addressing
        {82, 65536},            // registers of a multiprocessor
        {95, 0},                // cooperative launch
        {106, 32},              // blocks of a multiprocessor
        {111, 1 << 10},         // shared memory that the driver takes of each block
        {115, 0},               // memory pools
    };
    const Device& d = devices[device];
    if (attribute == 75) *value = d.major; // compute capability
    else if (attribute == 76) *value = d.minor;
    else if (attribute == 16) *value = d.multiprocessors;
    else if (attribute == 81) *value = d.shared_bytes + (1 << 10); // shared memory of a multiprocessor
    else if (attribute == 97) *value = d.shared_bytes;
    else if (attribute == 120) *value = d.has_clusters();
    else if (VALUES.count(attribute)) *value = VALUES.at(attribute);
    else return complain(INVALID_VALUE, "cuDeviceGetAttribute", std::to_string(attribute).c_str());
    return SUCCESS;
}

// ---- contexts: each device's own

DRIVER cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &devices[device];
    return SUCCESS;
}
DRIVER cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
DRIVER cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return SUCCESS; }

DRIVER cuCtxGetCurrent(void** context) {
    *context = current_device;
    return SUCCESS;
}

DRIVER cuCtxSetCurrent(void* context) {
    if (context) current_device = (Device*)context;
    return SUCCESS;
}
DRIVER cuCtxPushCurrent_v2(void* context) { return cuCtxSetCurrent(context); }
DRIVER cuCtxPopCurrent_v2(void** context) { return cuCtxGetCurrent(context); }

DRIVER cuCtxGetDevice(int* device) {
    *device = (int)(current_device - devices);
    return SUCCESS;
}

DRIVER cuCtxSynchronize() {
    NOT_WHILE_CAPTURING;
    carry_out_all();
    return SUCCESS;
}

DRIVER cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return SUCCESS;
}

DRIVER cuGetErrorString(int, const char** text) {
    *text = "an error of the make-believe driver";
    return SUCCESS;
}

DRIVER cuGetErrorName(int, const char** text) {
    *text = "CUDA_ON_CPU_ERROR";
    return SUCCESS;
}

// ---- memory

DRIVER cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
    NOT_WHILE_CAPTURING;
    return allocate(device_memory, bytes, pointer);
}

DRIVER cuMemFree_v2(uint64_t pointer) {
    NOT_WHILE_CAPTURING;
    return pointer ? release(device_memory, pointer) : SUCCESS;
}

DRIVER cuMemAllocHost_v2(void** pointer, size_t bytes) {
    NOT_WHILE_CAPTURING;
    return allocate(pinned_memory, bytes, (uint64_t*)pointer);
}

DRIVER cuMemHostAlloc(void** pointer, size_t bytes, unsigned) { return cuMemAllocHost_v2(pointer, bytes); }

DRIVER cuMemFreeHost(void* pointer) {
    NOT_WHILE_CAPTURING;
    return release(pinned_memory, (uint64_t)pointer);
}

DRIVER cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned) {
    LOCK;
    if (!is_pinned(host, 1)) return complain(INVALID_VALUE, __func__, "not pinned");
    *device = (uint64_t)host;
    return SUCCESS;
}

DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
    LOCK;
    *total = TOTAL_MEMORY;
    *free = TOTAL_MEMORY - used_memory;
    return SUCCESS;
}

DRIVER cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    NOT_WHILE_CAPTURING;
    CHECK_DEVICE(to, bytes);
    carry_out_default();
    memcpy((void*)to, from, bytes);
    return SUCCESS;
}

DRIVER cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    NOT_WHILE_CAPTURING;
    CHECK_DEVICE(from, bytes);
    carry_out_default();
    memcpy(to, (const void*)from, bytes);
    return SUCCESS;
}

DRIVER cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    NOT_WHILE_CAPTURING;
    CHECK_DEVICE(to, bytes);
    CHECK_DEVICE(from, bytes);
    carry_out_default();
    memmove((void*)to, (const void*)from, bytes);
    return SUCCESS;
}

DRIVER cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    LOCK;
    CHECK_DEVICE(to, bytes);
    if (is_pinned(from, bytes) || stream_of(stream).capturing) {
        return enqueue(stream, [=](Stream&) { memcpy((void*)to, from, bytes); });
    }
    const std::vector<char> taken((const char*)from, (const char*)from + bytes);
    return enqueue(stream, [=](Stream&) { memcpy((void*)to, taken.data(), bytes); });
}

DRIVER cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    CHECK_DEVICE(from, bytes);
    enqueue(stream, [=](Stream&) { memcpy(to, (const void*)from, bytes); });
    if (!is_pinned(to, bytes) && !stream_of(stream).capturing) carry_out(stream_of(stream));
    return SUCCESS;
}

DRIVER cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    LOCK;
    CHECK_DEVICE(to, bytes);
    CHECK_DEVICE(from, bytes);
    return enqueue(stream, [=](Stream&) { memmove((void*)to, (const void*)from, bytes); });
}

DRIVER cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void* stream) {
    LOCK;
    CHECK_DEVICE(to, n);
    return enqueue(stream, [=](Stream&) { memset((void*)to, value, n); });
}

DRIVER cuMemsetD32Async(uint64_t to, unsigned value, size_t n, void* stream) {
    LOCK;
    CHECK_DEVICE(to, n * 4);
    return enqueue(stream, [=](Stream&) {
        for (size_t i = 0; i < n; i++) ((unsigned*)to)[i] = value;
    });
}

DRIVER cuMemsetD8_v2(uint64_t to, unsigned char value, size_t n) {
    NOT_WHILE_CAPTURING;
    const int result = cuMemsetD8Async(to, value, n, nullptr);
    carry_out_default();
    return result;
}

DRIVER cuMemsetD32_v2(uint64_t to, unsigned value, size_t n) {
    NOT_WHILE_CAPTURING;
    const int result = cuMemsetD32Async(to, value, n, nullptr);
    carry_out_default();
    return result;
}

// ---- streams and events

DRIVER cuStreamCreate(void** stream, unsigned flags) {
    LOCK;
    streams.push_back(std::make_shared<Stream>());
    streams.back()->waits_for_default = (flags & 1) == 0;
    *stream = streams.back().get();
    return SUCCESS;
}

DRIVER cuStreamCreateWithPriority(void** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

DRIVER cuStreamDestroy_v2(void* stream) {
    carry_out(stream_of(stream));
    LOCK;
    for (size_t i = 0; i < streams.size(); i++) {
        if (streams[i].get() != stream) continue;
        streams.erase(streams.begin() + (long)i);
        return SUCCESS;
    }
    return INVALID_HANDLE;
}

DRIVER cuStreamSynchronize(void* stream) {
    NOT_WHILE_CAPTURING;
    if (stream) carry_out(stream_of(stream));
    else carry_out_default();
    return SUCCESS;
}

// Who asks again and again gets the work done in the end.
DRIVER cuStreamQuery(void* stream) {
    NOT_WHILE_CAPTURING;
    {
        LOCK;
        if (stream_of(stream).queue.empty()) return SUCCESS;
    }
    carry_out(stream_of(stream));
    return NOT_READY;
}

DRIVER cuEventCreate(void** event, unsigned) {
    *event = new Event();
    return SUCCESS;
}

DRIVER cuEventDestroy_v2(void* event) {
    Event* e = (Event*)event;
    if (e->pending) carry_out(*e->stream);
    delete e;
    return SUCCESS;
}

DRIVER cuEventRecord(void* event, void* stream) {
    LOCK;
    Event* e = (Event*)event;
    e->stream = &stream_of(stream);
    e->pending++;
    return enqueue(stream, [e](Stream&) {
        e->seconds = now();
        if (e->pending) e->pending--;
    });
}

DRIVER cuEventSynchronize(void* event) {
    NOT_WHILE_CAPTURING;
    Event* e = (Event*)event;
    if (e->pending) carry_out(*e->stream);
    return SUCCESS;
}

DRIVER cuEventQuery(void* event) {
    Event* e = (Event*)event;
    if (!e->pending) return SUCCESS;
    carry_out(*e->stream);
    return NOT_READY;
}

DRIVER cuStreamWaitEvent(void* stream, void* event, unsigned) {
    LOCK;
    Event* e = (Event*)event;
    return enqueue(stream, [e](Stream&) {
        if (e->pending) carry_out(*e->stream);
    });
}

DRIVER cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    LOCK;
    const Event *a = (Event*)from, *b = (Event*)to;
    if (!a->stream || !b->stream) return complain(INVALID_HANDLE, __func__, "an event was never recorded");
    if (a->pending || b->pending) return NOT_READY;
    *milliseconds = (float)((b->seconds - a->seconds) * 1e3);
    return SUCCESS;
}

DRIVER cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
    return cuEventElapsedTime(milliseconds, from, to);
}

DRIVER cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    LOCK;
    return enqueue(stream, [=](Stream&) { function(data); });
}

// ---- kernels

DRIVER cuModuleLoadData(void** module, const void* image) {
    NOT_WHILE_CAPTURING;
    const size_t bytes = library_bytes(image);
    if (!bytes) return complain(INVALID_IMAGE, __func__, "not a kernel of the make-believe nvrtc");
    void* library = load_library(image, bytes);
    if (!library) return INVALID_IMAGE;
    Module* m = new Module();
    m->library = library;
    *module = m;
    return SUCCESS;
}

DRIVER cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
    return cuModuleLoadData(module, image);
}

DRIVER cuModuleUnload(void* module) {
    carry_out_all();
    dlclose(((Module*)module)->library);
    delete (Module*)module;
    return SUCCESS;
}

DRIVER cuModuleGetFunction(void** function, void* module, const char* name) {
    LOCK;
    Module& m = *(Module*)module;
    const std::string run = std::string("emu_run_") + name, sizes = std::string("emu_sizes_") + name;
    Function f;
    f.name = name;
    f.turn = &m.turn;
    f.run = (void (*)(emu::Launch))dlsym(m.library, run.c_str());
    auto get_sizes = (unsigned (*)(size_t*))dlsym(m.library, sizes.c_str());
    if (!f.run || !get_sizes) return complain(NOT_FOUND, __func__, name);
    size_t all[256];
    f.argument_sizes.assign(all, all + get_sizes(all));
    *function = &(m.functions[name] = f);
    return SUCCESS;
}

DRIVER cuFuncSetAttribute(void* function, int attribute, int value) {
    LOCK;
    Function& f = *(Function*)function;
    if (attribute == 8) { // dynamic shared memory at most
        const bool fits = value >= 0 && value <= current_device->shared_bytes;
        if (!fits) return complain(INVALID_VALUE, __func__, "so much shared memory");
        f.max_dynamic_shared = value;
    } else if (attribute == 14) { // clusters of more than 8 blocks
        f.large_clusters = value != 0;
    } else if (attribute != 9) { // of L1 cache and shared memory, how much each
        return complain(INVALID_VALUE, __func__, std::to_string(attribute).c_str());
    }
    return SUCCESS;
}

DRIVER cuFuncGetAttribute(int* value, int attribute, void*) {
    switch (attribute) {
        case 0: *value = 1024; return SUCCESS; // threads
        case 1: case 2: case 3: *value = 0; return SUCCESS; // bytes of shared, constant, local memory
        case 4: *value = 32; return SUCCESS; // registers
        default: return complain(INVALID_VALUE, __func__, std::to_string(attribute).c_str());
    }
}

DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
    *blocks = 1;
    return SUCCESS;
}

DRIVER cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared_bytes, void* stream, void** parameters, void**) {
    LOCK;
    emu::Launch l = {};
    l.grid = {gx, gy, gz};
    l.block = {bx, by, bz};
    l.cluster = 1;
    l.shared_bytes = shared_bytes;
    return enqueue_launch(function, l, stream, parameters);
}

namespace {
struct LaunchAttribute {
    int id, padding;
    unsigned value[16];
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    const LaunchAttribute* attributes;
    unsigned n_attributes;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as cuda.h has them");
} // namespace

DRIVER cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
    LOCK;
    emu::Launch l = {};
    l.grid = {config->grid[0], config->grid[1], config->grid[2]};
    l.block = {config->block[0], config->block[1], config->block[2]};
    l.cluster = 1;
    l.shared_bytes = config->shared_bytes;
    const bool newer = stream_of(config->stream).device->has_clusters();
    for (unsigned i = 0; i < config->n_attributes; i++) {
        const LaunchAttribute& a = config->attributes[i];
        if (a.id == 4 && a.value[1] == 1 && a.value[2] == 1) l.cluster = a.value[0];
        else if (a.id == 4) return complain(INVALID_VALUE, __func__, "clusters along x only");
        else if (a.id == 6 && !newer) return complain(INVALID_VALUE, __func__, "no programmatic launch before 9.0");
        else if (a.id != 6) return complain(INVALID_VALUE, __func__, "an unknown attribute");
    }
    return enqueue_launch(function, l, config->stream, parameters);
}

// ---- graphs

DRIVER cuStreamBeginCapture_v2(void* stream, int mode) {
    LOCK;
    Stream& s = stream_of(stream);
    if (!stream || s.capturing) return complain(CAPTURE_UNSUPPORTED, __func__, "cannot capture this stream");
    s.capturing = new Graph();
    s.forbids_all_threads = mode == 0;
    n_forbidding += s.forbids_all_threads;
    n_capturing++;
    return SUCCESS;
}

DRIVER cuStreamEndCapture(void* stream, void** graph) {
    LOCK;
    Stream& s = stream_of(stream);
    if (!s.capturing) return complain(CAPTURE_INVALIDATED, __func__, "the stream does not capture");
    *graph = s.capturing;
    s.capturing = nullptr;
    n_forbidding -= s.forbids_all_threads;
    n_capturing--;
    return SUCCESS;
}

DRIVER cuStreamIsCapturing(void* stream, int* status) {
    LOCK;
    *status = stream_of(stream).capturing != nullptr;
    return SUCCESS;
}

DRIVER cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    LOCK;
    *executable = new Graph(*(Graph*)graph);
    return SUCCESS;
}

DRIVER cuGraphUpload(void*, void*) { return SUCCESS; }

DRIVER cuGraphLaunch(void* executable, void* stream) {
    LOCK;
    if (stream_of(stream).capturing) return complain(CAPTURE_UNSUPPORTED, __func__, "while the stream captures");
    for (const Work& work : ((Graph*)executable)->nodes) enqueue(stream, work);
    return SUCCESS;
}

DRIVER cuGraphGetNodes(void* graph, void**, size_t* n) {
    *n = ((Graph*)graph)->nodes.size();
    return SUCCESS;
}

DRIVER cuGraphExecDestroy(void* executable) {
    LOCK;
    delete (Graph*)executable;
    return SUCCESS;
}

DRIVER cuGraphDestroy(void* graph) {
    LOCK;
    delete (Graph*)graph;
    return SUCCESS;
}
