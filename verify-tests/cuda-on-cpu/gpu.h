// What the make-believe driver has behind its functions: GPUs, their streams and graphs, memory, kernels.
#pragma once
#include <dlfcn.h>
#include <elf.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

struct Stream;
using Work = std::function<void(Stream&)>; // given the stream that it is carried out on

struct Graph {
    std::vector<Work> nodes;
};

// There is a GPU of each kind that kernels are written for, and one of each with a single multiprocessor, for which
// small matrices are large. Each has one context, and all use the same memory.
struct Device {
    const char* name;
    int major, minor;
    int shared_bytes; // of a block at most
    int multiprocessors;

    bool has_clusters() const { return major >= 9; }
};
Device devices[] = {
    {"CUDA on the CPU, like an H100", 9, 0, 227 << 10, 4},
    {"CUDA on the CPU, like an A100", 8, 0, 163 << 10, 4},
    {"CUDA on the CPU, like a slice of an H100", 9, 0, 227 << 10, 1},
    {"CUDA on the CPU, like a slice of an A100", 8, 0, 163 << 10, 1},
    {"CUDA on the CPU, like a slice of an RTX 4090", 8, 9, 99 << 10, 1},
};
constexpr int N_DEVICES = sizeof devices / sizeof devices[0];

thread_local Device* current_device = &devices[0]; // whose context is current

struct Stream {
    Device* device = current_device;
    std::recursive_mutex turn; // who holds it carries out the queue
    emu::Machine machine;
    uint64_t n_launches = 0;
    bool waits_for_default = true;
    std::deque<Work> queue;
    Graph* capturing = nullptr;
    bool forbids_all_threads = false; // while it captures, what could disturb that; else its own thread only
};

struct Event {
    Stream* stream = nullptr; // where it was recorded last
    std::atomic<unsigned> pending{0};
    double seconds = 0;
};

struct Function {
    std::string name;
    std::mutex* turn; // of its library, which runs one launch at a time
    void (*run)(emu::Launch);
    std::vector<size_t> argument_sizes;
    int max_dynamic_shared = 48 << 10;
    bool large_clusters = false;
};

struct Module {
    void* library;
    std::mutex turn;
    std::map<std::string, Function> functions;
};

constexpr size_t TOTAL_MEMORY = (size_t)8 << 30;

// All that there is. Who holds `mutex` looks into it or changes it, and carries out nothing meanwhile.
std::recursive_mutex mutex;
std::map<uintptr_t, emu::Guarded> device_memory, pinned_memory;
size_t used_memory = 0;
Stream default_stream;
std::vector<std::shared_ptr<Stream>> streams;
unsigned n_forbidding = 0;             // captures that forbid all threads
thread_local unsigned n_capturing = 0; // captures that this thread has begun

#define LOCK std::lock_guard<std::recursive_mutex> lock(mutex)
bool is_capturing() {
    LOCK;
    return n_forbidding || n_capturing;
}

#define NOT_WHILE_CAPTURING \
    if (is_capturing()) return complain(CAPTURE_UNSUPPORTED, __func__, "while a stream captures")

int complain(Result result, const char* function, const char* problem) {
    fprintf(stderr, "cuda_on_cpu: %s: %s\n", function, problem);
    return result;
}

Stream& stream_of(void* stream) { return stream ? *(Stream*)stream : default_stream; }

void carry_out(Stream& stream) {
    std::lock_guard<std::recursive_mutex> turn(stream.turn);
    for (;;) {
        Work work;
        {
            LOCK;
            if (stream.queue.empty()) return;
            work = std::move(stream.queue.front());
            stream.queue.pop_front();
        }
        work(stream);
    }
}

std::vector<std::shared_ptr<Stream>> all_streams() {
    LOCK;
    return streams;
}

void carry_out_all() {
    carry_out(default_stream);
    for (const auto& stream : all_streams()) carry_out(*stream);
}

// As a call on the default stream does, which waits for all streams but those that do not want it.
void carry_out_default() {
    carry_out(default_stream);
    for (const auto& stream : all_streams())
        if (stream->waits_for_default) carry_out(*stream);
}

int enqueue(void* stream, Work work) {
    LOCK;
    Stream& s = stream_of(stream);
    if (s.capturing) s.capturing->nodes.push_back(std::move(work));
    else s.queue.push_back(std::move(work));
    return SUCCESS;
}

// Whether the bytes lie in one allocation.
bool is_inside(const std::map<uintptr_t, emu::Guarded>& memory, uintptr_t begin, size_t bytes) {
    LOCK;
    auto after = memory.upper_bound(begin);
    if (after == memory.begin()) return false;
    const emu::Guarded& g = std::prev(after)->second;
    return begin + bytes <= (uintptr_t)g.begin + g.bytes;
}
bool is_device(uint64_t begin, size_t bytes) { return is_inside(device_memory, begin, bytes); }
bool is_pinned(const void* begin, size_t bytes) { return is_inside(pinned_memory, (uintptr_t)begin, bytes); }

#define CHECK_DEVICE(pointer, bytes) \
    if (!is_device(pointer, bytes)) return complain(INVALID_VALUE, __func__, "not inside one allocation of the device")

int allocate(std::map<uintptr_t, emu::Guarded>& memory, size_t bytes, uint64_t* pointer) {
    LOCK;
    if (!bytes) return complain(INVALID_VALUE, "allocate", "no bytes");
    if (used_memory + bytes > TOTAL_MEMORY) return OUT_OF_MEMORY;
    emu::Guarded g = emu::Guarded::allocate(bytes, 256);
    if (!g.begin) return OUT_OF_MEMORY;
    used_memory += bytes;
    *pointer = (uint64_t)g.begin;
    memory[(uintptr_t)g.begin] = g;
    return SUCCESS;
}

int release(std::map<uintptr_t, emu::Guarded>& memory, uint64_t pointer) {
    carry_out_all();
    LOCK;
    auto found = memory.find(pointer);
    if (found == memory.end()) return complain(INVALID_VALUE, "release", "not the beginning of an allocation");
    used_memory -= found->second.bytes;
    found->second.release();
    memory.erase(found);
    return SUCCESS;
}

void check_guards(const emu::Launch& launch) {
    LOCK;
    for (const auto& memory : {std::cref(device_memory), std::cref(pinned_memory)}) {
        for (const auto& entry : memory.get()) {
            if (entry.second.is_intact()) continue;
            fprintf(stderr, "cuda_on_cpu: kernel %s, seed %llu, wrote next to memory of %zu bytes\n", launch.kernel,
                    (unsigned long long)launch.seed, entry.second.bytes);
            abort();
        }
    }
}

void launch(const Function& function, emu::Launch launch, const std::vector<std::vector<char>>& arguments) {
    std::lock_guard<std::mutex> turn(*function.turn);
    std::vector<void*> pointers;
    for (const auto& argument : arguments) pointers.push_back((void*)argument.data());
    launch.kernel = function.name.c_str();
    launch.arguments = pointers.data();
    emu::running = launch.machine;
    function.run(launch);
    emu::running = nullptr;
    check_guards(launch);
}

int enqueue_launch(void* f, emu::Launch l, void* stream, void** parameters) {
    const Function& function = *(Function*)f;
    const Device& device = *stream_of(stream).device;
    const size_t threads = (size_t)l.block.x * l.block.y * l.block.z;
    const unsigned largest = function.large_clusters ? 16 : 8;
    const bool cluster_fits = l.cluster && l.grid.x % l.cluster == 0 && l.cluster <= largest;
    if (threads == 0 || threads > 1024 || !l.grid.x || !l.grid.y || !l.grid.z || l.grid.y > 65535 || l.grid.z > 65535) {
        return complain(INVALID_VALUE, function.name.c_str(), "no such grid or block");
    }
    if ((int)l.shared_bytes > function.max_dynamic_shared) {
        return complain(INVALID_VALUE, function.name.c_str(), "more shared memory than cuFuncSetAttribute allowed");
    }
    if (!cluster_fits || (l.cluster > 1 && !device.has_clusters())) {
        return complain(INVALID_VALUE, function.name.c_str(), "no such cluster");
    }
    std::vector<std::vector<char>> arguments;
    for (size_t i = 0; i < function.argument_sizes.size(); i++) {
        const char* argument = (const char*)parameters[i];
        arguments.emplace_back(argument, argument + function.argument_sizes[i]);
    }
    // What a graph captured runs on the stream that it is launched on: the machine is known only then.
    return enqueue(stream, [&function, l, arguments](Stream& on) {
        emu::Launch now = l;
        now.machine = &on.machine;
        const char* seed = getenv("EMU_SEED");
        now.seed = seed ? strtoull(seed, nullptr, 10) : 0;
        if (now.seed) now.seed += on.n_launches++; // another order each time
        launch(function, now, arguments);
    });
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// Where a shared library in memory ends: behind its table of sections.
size_t library_bytes(const void* image) {
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_type != ET_DYN) return 0;
    return header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
}

// Loads a library through a file that is gone afterwards.
void* load_library(const void* image, size_t bytes) {
    const char* folder = getenv("TMPDIR");
    std::string path = std::string(folder ? folder : "/tmp") + "/treespark-kernel-XXXXXX";
    const int file = mkstemp(&path[0]);
    if (file < 0) return nullptr;
    bool whole = true;
    for (size_t done = 0; whole && done < bytes;) {
        const ssize_t n = write(file, (const char*)image + done, bytes - done);
        whole = n > 0;
        done += whole ? (size_t)n : 0;
    }
    close(file);
    void* library = whole ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) fprintf(stderr, "cuda_on_cpu: %s\n", whole ? dlerror() : "cannot write a kernel");
    unlink(path.c_str());
    return library;
}

} // namespace
