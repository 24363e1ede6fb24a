// Memory that finds writes outside of it: pages that may not be touched lie on both sides, and the few bytes between
// those and the memory hold a pattern that is checked now and then. Fresh memory is full of NaN.
#pragma once
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

namespace emu {

constexpr unsigned char POISON = 0xff; // a NaN in f32, bf16 and f16
constexpr unsigned char FENCE = 0xfd;

struct Guarded {
    static constexpr size_t PAGE = 4096;

    unsigned char* mapped = nullptr;
    size_t mapped_bytes = 0;
    unsigned char* begin = nullptr;
    size_t bytes = 0;

    // Memory that ends as close to a forbidden page as `alignment`, a power of two up to a page, lets it.
    static Guarded allocate(size_t bytes, size_t alignment) {
        Guarded g;
        const size_t inner = (bytes + alignment - 1) / alignment * alignment;
        const size_t pages = (inner + PAGE - 1) / PAGE * PAGE;
        g.mapped_bytes = pages + 2 * PAGE;
        void* mapped = mmap(nullptr, g.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) return Guarded();
        g.mapped = (unsigned char*)mapped;
        g.begin = g.mapped + PAGE + pages - inner;
        g.bytes = bytes;
        mprotect(g.mapped + PAGE, pages, PROT_READ | PROT_WRITE);
        memset(g.mapped + PAGE, FENCE, pages);
        g.poison();
        return g;
    }

    void poison() { memset(begin, POISON, bytes); }

    bool contains(const void* p) const { return p >= begin && p < begin + bytes; }

    // Whether nothing was written next to it.
    bool is_intact() const {
        const unsigned char* end = mapped + mapped_bytes - PAGE;
        for (const unsigned char* p = mapped + PAGE; p < begin; p++)
            if (*p != FENCE) return false;
        for (const unsigned char* p = begin + bytes; p < end; p++)
            if (*p != FENCE) return false;
        return true;
    }

    void release() {
        if (mapped) munmap(mapped, mapped_bytes);
        *this = Guarded();
    }
};

} // namespace emu
