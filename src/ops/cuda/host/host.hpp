// CUDA C on the CPU, for tests: runs the source of the kernels thread by thread.
//
// The threads of a block are fibers. A warp runs until all of its threads wait for other warps,
// then the next one runs, in ascending or descending order. So a missing barrier gives a wrong
// result. Asynchronous copies are made on the wait for them. A block whose threads do not all reach
// a barrier ends the process.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct float2 {
    float x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t __float2uint_rn(float v) { return (uint32_t)std::nearbyint(v); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
// Returns the bytes of y and x, of which x has the last ones, that the digits of s choose.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
    const uint64_t bytes = (uint64_t)y << 32 | x;
    uint32_t chosen = 0;
    for (int i = 0; i < 4; ++i) {
        chosen |= (uint32_t)(bytes >> 8 * (s >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return chosen;
}
template <typename T> T __ldg(const T *p) { return *p; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

// ---- 16-bit floats ----

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

inline uint32_t to_bits(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits;
}

inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
    // A product corrects the bias of the exponent, also for subnormals.
    const float v = rest >= 0x7c00u ? from_bits(0x7f800000u | (rest & 0x3ffu) << 13) : from_bits(rest << 13) * 0x1p112f;
    return from_bits(sign | to_bits(v));
}

inline float __uint_as_float(uint32_t bits) { return from_bits(bits); }
inline uint32_t __float_as_uint(float v) { return to_bits(v); }

inline __half __float2half_rn(float v) {
    const uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7fffu;
    } else if (rest >= 0x477ff000u) {
        half = 0x7c00u;
    } else if (rest < 0x38800000u) {
        // Steps below the smallest normal number are equal, so an addition rounds.
        half = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
    } else {
        half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
    }
    return {(uint16_t)(sign | half)};
}

inline float __bfloat162float(__nv_bfloat16 b) { return from_bits((uint32_t)b.bits << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    const uint32_t bits = to_bits(v);
    return {(uint16_t)(v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

struct __half2 {
    __half x, y;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

// ---- Collective operations of threads ----

void __syncthreads();

namespace host {

// Calls `all` with the values of all lanes when the last lane has arrived. They live until then.
void together(void *value, void (*all)(void *const lanes[32]));

inline float number(const __half *, uint16_t bits) { return __half2float({bits}); }
inline float number(const __nv_bfloat16 *, uint16_t bits) { return __bfloat162float({bits}); }

struct Product {
    float *d;
    const uint32_t *a;
    uint32_t b[2];
};

// mma.m16n8k16 with the fragments of the PTX manual. With g = l / 4 and t = l % 4, lane l holds
// - of a, rows g and g + 8 at columns 2t, 2t + 1 and those plus 8
// - of b, column g at rows 2t, 2t + 1 and those plus 8
// - of d, rows g and g + 8 at columns 2t, 2t + 1
template <typename T> void multiply(void *const lanes[32]) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto &p = *(const Product *)lanes[lane];
        const int g = lane / 4, t = lane % 4;
        for (int e = 0; e < 2; ++e) {
            for (int i = 0; i < 4; ++i) {
                left[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = number((T *)nullptr, p.a[i] >> 16 * e & 0xffff);
            }
            for (int i = 0; i < 2; ++i) {
                right[2 * t + i * 8 + e][g] = number((T *)nullptr, p.b[i] >> 16 * e & 0xffff);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const auto &p = *(const Product *)lanes[lane];
        for (int i = 0; i < 4; ++i) {
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) {
                sum += left[lane / 4 + i / 2 * 8][k] * right[k][2 * (lane % 4) + i % 2];
            }
            p.d[i] += sum;
        }
    }
}

struct Matrices {
    uint32_t *m;
    const void *row;
};

template <bool TRANSPOSED> void load(void *const lanes[32]) {
    for (int i = 0; i < 4; ++i) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            const void *from = ((const Matrices *)lanes[8 * i + row])->row;
            // The hardware requires it.
            if ((uintptr_t)from % 16) {
                __builtin_trap();
            }
            std::memcpy(matrix[row], from, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            const uint32_t low = TRANSPOSED ? matrix[column][row] : matrix[row][column];
            const uint32_t high = TRANSPOSED ? matrix[column + 1][row] : matrix[row][column + 1];
            ((Matrices *)lanes[lane])->m[i] = high << 16 | low;
        }
    }
}

struct Transposition {
    uint32_t pair;
    uint32_t result;
};

inline void transpose(void *const lanes[32]) {
    for (int lane = 0; lane < 32; ++lane) {
        auto &mine = *(Transposition *)lanes[lane];
        // Element `row` of row `column` is in half `row` % 2 of lane 4 `column` + `row` / 2.
        const int row = lane / 4, column = lane % 4 * 2, from = 4 * column + row / 2;
        const auto half = [&](int lane) { return ((const Transposition *)lanes[lane])->pair >> row % 2 * 16 & 0xffff; };
        mine.result = half(from + 4) << 16 | half(from);
    }
}

struct Shuffle {
    float value;
    int mask;
    float result;
};

inline void shuffle(void *const lanes[32]) {
    for (int lane = 0; lane < 32; ++lane) {
        auto &mine = *(Shuffle *)lanes[lane];
        mine.result = ((const Shuffle *)lanes[lane ^ mine.mask])->value;
    }
}

struct Copy {
    void *to;
    const void *from;
    bool copy;
};

// Groups of copies of the running thread. The last group is open.
std::deque<std::vector<Copy>> &copies();

} // namespace host

template <typename T> void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::Product product{d, a, {b0, b1}};
    host::together(&product, host::multiply<T>);
}

inline void load_matrices(uint32_t (&m)[4], const void *row) {
    host::Matrices matrices{m, row};
    host::together(&matrices, host::load<false>);
}

inline void load_transposed(uint32_t (&m)[4], const void *row) {
    host::Matrices matrices{m, row};
    host::together(&matrices, host::load<true>);
}

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
    host::Shuffle shuffle{value, mask, 0.0f};
    host::together(&shuffle, host::shuffle);
    return shuffle.result;
}

inline void copy_async(void *to, const void *from, bool copy) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16) {
        __builtin_trap();
    }
    host::copies().back().push_back({to, from, copy});
}

inline void commit_copies() { host::copies().emplace_back(); }

template <int N> void wait_copies() {
    auto &copies = host::copies();
    while (copies.size() - 1 > N) {
        for (const auto &c : copies.front()) {
            c.copy ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
        }
        copies.pop_front();
    }
}

// ---- Instructions of candidates.cu ----

inline uint32_t transposed(uint32_t pair) {
    host::Transposition transposition{pair, 0};
    host::together(&transposition, host::transpose);
    return transposition.result;
}

// Matrix in blocks of 8 x 8 halves, and the bytes from one block to the next.
struct Tile {
    const char *at;
    uint32_t along_k, along_n;
};

inline Tile tile_at(const void *at, uint32_t along_k, uint32_t along_n) {
    // The hardware requires it.
    if ((uintptr_t)at % 16 || along_k % 16 || along_n % 16) {
        __builtin_trap();
    }
    return {(const char *)at, along_k, along_n};
}

inline Tile advanced(Tile tile, uint32_t bytes) { return tile_at(tile.at + bytes, tile.along_k, tile.along_n); }

// Products are made at once, so missing fences are not detected.
inline void fence_tiles() {}
template <int SUMS> void begin_products(float (&)[SUMS]) {}
template <int SUMS> void end_products(float (&)[SUMS]) {}

// wgmma with `a` in registers. Each warp has 16 rows of it, in fragments of m16n8k16, and reads all of `b`.
template <int SUMS> void group_product(float (&d)[SUMS], const uint32_t (&a)[4], const Tile &b) {
    const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    for (int n = 0; n < SUMS / 4; ++n) {
        const auto halves = [&](int k) {
            uint32_t bits;
            std::memcpy(&bits, b.at + n * b.along_n + k / 8 * b.along_k + row * 16 + k % 8 * 2, 4);
            return bits;
        };
        float sums[4] = {d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3]};
        mma<__half>(sums, a, halves(pair), halves(pair + 8));
        std::memcpy(d + 4 * n, sums, sizeof sums);
    }
}
