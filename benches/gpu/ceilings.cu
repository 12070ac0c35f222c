// Kernels that measure limits of a device. Each takes one structure by value, Args in ceilings.rs.

#include "warp.cuh"

struct Args {
    uint4 *to;
    const uint4 *from;
    // Number of uint4, and of repetitions.
    uint32_t count, repeats;
};

extern "C" __global__ void nothing(const __grid_constant__ Args) {}

extern "C" __global__ void copy(const __grid_constant__ Args p) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += gridDim.x * blockDim.x) {
        p.to[i] = p.from[i];
    }
}

// Reads the same array again and again. It fits in the L2 cache, but not in the caches of the
// multiprocessors, as each block begins elsewhere.
extern "C" __global__ void read(const __grid_constant__ Args p) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) % p.count;
    for (uint32_t n = 0; n < p.repeats; ++n) {
        const uint4 v = __ldcg(p.from + at);
        sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
        at += gridDim.x * blockDim.x;
        at = at >= p.count ? at % p.count : at;
    }
    if (sum.x == 1 && sum.y == 2 && sum.z == 3 && sum.w == 4) {
        *p.to = sum;
    }
}

// Eight independent products of a warp, 16 x 8 x 16 each.
extern "C" __global__ void products(const __grid_constant__ Args p) {
    float sums[8][4] = {};
    uint32_t a[4] = {threadIdx.x, threadIdx.x, threadIdx.x, threadIdx.x};
    for (uint32_t n = 0; n < p.repeats; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            mma<__half>(sums[i], a, n, n);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sum += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
    }
    if (sum == 1.2345f) {
        *p.to = make_uint4(1, 2, 3, 4);
    }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Two products of a warpgroup, 64 x 64 x 16 each, from shared memory.
extern "C" __global__ void __launch_bounds__(128) group_products(const __grid_constant__ Args p) {
    __shared__ __align__(128) unsigned char tiles[8192];
    for (int i = threadIdx.x; i < 2048; i += 128) {
        reinterpret_cast<uint32_t *>(tiles)[i] = 0;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    // Matrices of 8 x 8 halves, 128 bytes each: 128 bytes from one to the next along the rows and 1024
    // along the inner dimension.
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(tiles);
    const unsigned long long layout = (1024ull >> 4) << 16 | (128ull >> 4) << 32;
    const unsigned long long a = layout | (base & 0x3ffff) >> 4, b = layout | ((base + 2048) & 0x3ffff) >> 4;
    float sums[2][32] = {};
    for (uint32_t n = 0; n < p.repeats; ++n) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float(&d)[32] = sums[i];
            asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                         "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                         "%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
                         : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                           "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                           "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                           "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                           "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                         : "l"(a), "l"(b));
        }
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        sum += sums[0][i] + sums[1][i];
    }
    if (sum == 1.2345f) {
        *p.to = make_uint4(1, 2, 3, 4);
    }
}
#endif
