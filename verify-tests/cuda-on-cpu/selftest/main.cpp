// Checks the emulation: without arguments, that right kernels give right results; with the name of a kernel of
// faults.cu, runs that: it prints "wrong" or "right", or the process ends.
#define CUDA_ON_CPU
#include "../cuda_on_cpu.h"
#include "../machine.cpp"
namespace {
#include "right.cu"
}
namespace faults {
#include "faults.cu"
}
#include <vector>

static void expect(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint32_t random_word() {
    static uint32_t state = 12345;
    return state = state * 1664525 + 1013904223;
}
static float random_number() { return (float)(random_word() >> 8) / (1 << 23) - 1.0f; }

static void check_softmax() {
    const int rows = 5, n = 300;
    std::vector<float> x(rows * n), y(rows * n);
    for (float& v : x) v = 4.0f * random_number();
    emu::launch(row_softmax, rows, 256, 1, 0, x.data(), y.data(), n);
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += exp((double)x[r * n + i]);
        for (int i = 0; i < n; i++) expect(fabs(exp((double)x[r * n + i]) / sum - y[r * n + i]) < 1e-7, "softmax");
    }
}

static void check_gemm(bool f16) {
    const int m = 32, n = 48, k = 80;
    std::vector<unsigned short> a(m * k), b(n * k);
    std::vector<float> c(m * n);
    auto narrow = [f16](float v) { return (unsigned short)(f16 ? pack_f16(v, 0) : pack_bf16(v, 0)); };
    auto widen = [f16](unsigned short v) { return f16 ? emu::widen_f16(v) : emu::widen_bf16(v); };
    for (auto& v : a) v = narrow(random_number());
    for (auto& v : b) v = narrow(random_number());
    emu::launch(gemm, dim3(n / 16, m / 16), 32, 1, 3 * 1024, a.data(), b.data(), c.data(), n, k, f16);
    for (int row = 0; row < m; row++) {
        for (int column = 0; column < n; column++) {
            double sum = 0;
            for (int i = 0; i < k; i++) sum += (double)widen(a[row * k + i]) * widen(b[column * k + i]);
            expect(fabs(sum - c[row * n + column]) < 1e-5, "gemm");
        }
    }
}

static void check_matrices() {
    std::vector<unsigned short> in(256), out(256);
    for (int i = 0; i < 256; i++) in[i] = (unsigned short)i;
    for (int transposed = 0; transposed < 2; transposed++) {
        emu::launch(through_registers, 1, 32, 1, 0, in.data(), out.data(), transposed);
        for (int i = 0; i < 256; i++) {
            const int row = i / 8 % 8, column = i % 8;
            expect(out[i] == in[transposed ? i / 64 * 64 + column * 8 + row : i], "ldmatrix");
        }
    }
}

static void check_cluster() {
    std::vector<int> x(3 * 1000), y(3);
    for (int i = 0; i < 3000; i++) x[i] = i;
    emu::launch(cluster_sum, 12, 64, 4, 16, x.data(), y.data(), 1000);
    for (int i = 0; i < 3; i++) expect(y[i] == 1000 * (1000 * i) + 999 * 500, "cluster_sum");
}

static void check_producer() {
    const int tiles = 7;
    std::vector<float> x(tiles * 256), y(96);
    for (size_t i = 0; i < x.size(); i++) x[i] = (float)i;
    emu::launch(producer, 1, 128, 1, 2048 + 32, x.data(), y.data(), tiles);
    for (int t = 0; t < 96; t++) {
        float sum = 0;
        for (int tile = 0; tile < tiles; tile++)
            for (int i = t; i < 256; i += 96) sum += x[tile * 256 + i];
        expect(sum == y[t], "producer");
    }
}

static void check_copier() {
    const int tiles = 7;
    std::vector<float> storage(tiles * 128 + 4), y(32);
    float* x = (float*)(((uintptr_t)storage.data() + 15) & ~(uintptr_t)15);
    for (int i = 0; i < tiles * 128; i++) x[i] = (float)i;
    emu::launch(copier, 1, 64, 1, 1024 + 32, x, y.data(), tiles);
    for (int t = 0; t < 32; t++) {
        float sum = 0;
        for (int i = t; i < tiles * 128; i += 32) sum += x[i];
        expect(sum == y[t], "copier");
    }
}

static void check_intrinsics() {
    std::vector<unsigned> out(32 * 21);
    emu::launch(intrinsics, 1, 32, 1, 0, out.data());
    const unsigned want[] = {15,  2,  5, 9, 0x49249249, 1,  0, // as intrinsics() lists them
                             496, 31, (unsigned)-7,     10, 3, 9, 31, 4, 0xc0000000,
                             0x3f000000, 0xc0003f80, 0xc0003c00, 0x3eaaa000, 0x3f823f80};
    for (int i = 0; i < 21; i++) {
        if (out[i * 32 + 7] == want[i] || i == 1) continue;
        fprintf(stderr, "intrinsic %d: %x, not %x\n", i, out[i * 32 + 7], want[i]);
        exit(1);
    }
    for (unsigned lane = 0; lane < 32; lane++) expect(out[32 + lane] == (lane & 24) + (lane + 1) % 8, "width");
}

static bool is(const char* name, const char* kernel) { return strcmp(name, kernel) == 0; }

static int run_fault(const char* name) {
    emu::Guarded y = emu::Guarded::allocate(1024 * sizeof(float), 16);
    float* out = (float*)y.begin;
    std::vector<float> x(256, 2.0f);
    float* in = (float*)(((uintptr_t)x.data() + 15) & ~(uintptr_t)15);
    bool right = true;
    if (is(name, "missing_barrier")) {
        emu::launch(faults::missing_barrier, 1, 256, 1, 0, out);
        for (int i = 0; i < 256; i++) right &= out[i] == (float)((i + 255) % 256);
    } else if (is(name, "barrier_too_few")) {
        emu::launch(faults::barrier_too_few, 1, 256, 1, 0, out);
        for (int i = 0; i < 1024; i++) right &= out[i] == (float)((i + 128) % 256 + i / 256);
    } else if (is(name, "divergent_shuffle")) {
        emu::launch(faults::divergent_shuffle, 1, 64, 1, 0, out);
    } else if (is(name, "missing_copy_wait")) {
        emu::launch(faults::missing_copy_wait, 1, 32, 1, 0, out, in);
        for (int i = 0; i < 128; i++) right &= out[i] == 2.0f;
    } else if (is(name, "out_of_bounds")) {
        emu::launch(faults::out_of_bounds, 1, 1024, 1, 0, out);
    } else if (is(name, "behind_shared")) {
        emu::launch(faults::behind_shared, 1, 64, 1, 64, out);
    } else if (is(name, "barrier_for_some")) {
        emu::launch(faults::barrier_for_some, 1, 64, 1, 0, out);
    } else if (is(name, "misaligned_copy")) {
        emu::launch(faults::misaligned_copy, 1, 32, 1, 0, out, in);
    } else if (is(name, "barrier_never_ends")) {
        emu::launch(faults::barrier_never_ends, 1, 32, 1, 0, out);
    } else {
        printf("no such kernel\n");
        return 2;
    }
    printf("%s\n", right ? "right" : "wrong");
    return 0;
}

int main(int n, char** arguments) {
    if (n == 2) return run_fault(arguments[1]);
    check_softmax();
    check_gemm(false);
    check_gemm(true);
    check_matrices();
    check_cluster();
    check_producer();
    check_copier();
    check_intrinsics();
    return 0;
}
