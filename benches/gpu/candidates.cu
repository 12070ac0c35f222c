// Candidates for a student's convolutions with a kernel of 3x3. benches/gpu.sh compares them with a
// reference and times them beside the kernels in use (candidates.rs). The border is zero.
//
// Channels in matrix fragments are permuted, so that a thread has four consecutive channels of a
// cell, and four threads a sector of 32 bytes: column `i` of fragment `j` is channel_of(j, i).

#include "../../src/ops/cuda/kernels/warp.cuh"

struct Layer {
    const __half *input;   // [height][width][C]
    const __half *weights; // [C / 16][9][C][16] as in student.cu, one layer after the other
    const float *bias;     // [C], one layer after the other
    __half *output;        // [height][width][C]
    // Size of the map, and the rows that a block computes.
    uint32_t width, height, rows;
    float slope;
};

static_assert(sizeof(Layer) == 48, "size in candidates.rs");

// ---- Instructions that warp.cuh lacks; host.hpp has them for tests on the CPU ----

#ifdef __CUDACC__

// Transposes a matrix of 8 x 8 halves. Lane l has elements 2 (l % 4) and the next of row l / 4.
__device__ inline uint32_t transposed(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Descriptor of a matrix in shared memory for wgmma, in blocks of 8 x 8 halves, 128 bytes each.
using Tile = unsigned long long;

// `along_k` and `along_n` are the bytes from one block to the next.
__device__ inline Tile tile_at(const void *at, uint32_t along_k, uint32_t along_n) {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(at) & 0x3ffff;
    return address >> 4 | (Tile)(along_k >> 4) << 16 | (Tile)(along_n >> 4) << 32;
}

__device__ inline Tile advanced(Tile tile, uint32_t bytes) { return tile + (bytes >> 4); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Makes writes to shared memory visible to wgmma.
__device__ inline void fence_tiles() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving accesses to the sums of products.
__device__ inline void pin(float (&sums)[52]) {
#pragma unroll
    for (int i = 0; i < 52; ++i) {
        asm volatile("" : "+f"(sums[i])::"memory");
    }
}

__device__ inline void begin_products(float (&sums)[52]) {
    pin(sums);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Waits for the products.
__device__ inline void end_products(float (&sums)[52]) {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    pin(sums);
}

// d += a b for a warpgroup: a is 64 x 16, 16 rows a warp in fragments as those of mma, b 16 x 104.
__device__ inline void group_product(float (&d)[52], const uint32_t (&a)[4], Tile b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n104k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
        "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
        "%50,%51}, {%52,%53,%54,%55}, %56, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
#endif

// ---- Reference ----

// Block: (channels, cells of a row); grid: (blocks of a row, rows).
extern "C" __global__ void direct(const __grid_constant__ Layer p) {
    const uint32_t channels = blockDim.x, channel = threadIdx.x;
    const uint32_t x = blockIdx.x * blockDim.y + threadIdx.y, y = blockIdx.y;
    if (x >= p.width) {
        return;
    }
    float sum = p.bias[channel];
    for (uint32_t tap = 0; tap < 9; ++tap) {
        // Before the first row or column, they wrap and are outside as well.
        const uint32_t from_x = x + tap % 3 - 1, from_y = y + tap / 3 - 1;
        if (from_x >= p.width || from_y >= p.height) {
            continue;
        }
        const __half *cell = p.input + ((size_t)from_y * p.width + from_x) * channels;
        for (uint32_t k = 0; k < channels; ++k) {
            const size_t weight = ((k / 16 * 9 + tap) * channels + channel) * 16 + k % 16;
            sum += __half2float(cell[k]) * __half2float(p.weights[weight]);
        }
    }
    p.output[((size_t)y * p.width + x) * channels + channel] = __float2half_rn(sum > 0.0f ? sum : sum * p.slope);
}

// ---- Rows in a stream ----
//
// A block moves down a strip of the map. Each row of the input is copied to shared memory once and
// read three times, once for each column of the kernel. It adds to three rows of sums.

__device__ inline int channel_of(int fragment, int column) { return column / 2 * 4 + fragment * 2 + column % 2; }

__device__ inline uint32_t weights_at(const __half *p) { return *reinterpret_cast<const uint32_t *>(p); }

// Returns two sums after the leaky ReLU with a slope from 0 to 1.
__device__ inline uint32_t activated(float a, float b, float slope) {
    const __half2 pair = __floats2half2_rn(fmaxf(a, a * slope), fmaxf(b, b * slope));
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// Warps that share a row, cells and output channels of a warp, rows in shared memory.
constexpr int WARPS = 4, CELLS = 32, CHANNELS = 16, SLOTS = 4;
// Halves from one cell to the next in shared memory. The 8 cells of a matrix begin in different
// banks.
template <int C> constexpr int STEP = C + 8;

// Starts to copy WIDTH cells of row `y` from column `left` on.
template <int C, int WIDTH, int THREADS> __device__ void copy_row(__half *to, const Layer &p, int left, int y) {
    constexpr int PIECES = C / 8;
    const int first = threadIdx.x / PIECES, part = threadIdx.x % PIECES * 8, x = left + first;
    const __half *from = p.input + ((long long)y * p.width + x) * C + part;
#pragma unroll
    for (int cell = 0; cell < WIDTH; cell += THREADS / PIECES) {
        if (first + cell < WIDTH) {
            const bool inside = (uint32_t)y < p.height && (uint32_t)(x + cell) < p.width;
            copy_async(to + (first + cell) * STEP<C> + part, inside ? from + cell * C : p.input, inside);
        }
    }
}

// Weights and sums of a warp. Sums of row `y` are in sums[y % 3].
template <int C> struct Rows {
    static constexpr int TILES = CELLS / 16;
    uint32_t weights[C / 16][9][4];
    float bias[4], sums[3][TILES][2][4], slope;

    // `first` is the first output channel.
    __device__ Rows(const __half *from, const float *biases, int first, float slope) : slope(slope) {
        const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < C / 16 * 9 * 4; ++i) {
            // Fragment i / 2 % 2, first or second eight input channels.
            const int row = i / 4 * C + first + channel_of(i / 2 % 2, group);
            weights[i / 36][i / 4 % 9][i % 4] = weights_at(from + row * 16 + i % 2 * 8 + pair);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bias[i] = biases[first + 2 * pair + i];
        }
#pragma unroll
        for (int i = 0; i < 3 * TILES * 8; ++i) {
            sums[i / (8 * TILES)][i / 8 % TILES][i / 4 % 2][i % 4] = bias[i / 4 % 2 * 2 + i % 2];
        }
    }

    // Adds a row of the input, whose number is `phase` modulo 3, to the sums of rows `phase` - 2 to
    // `phase`. `row` is the cell to the left of the warp's first.
    __device__ void add(const __half *row, int phase) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < C / 16 * TILES * 3; ++i) {
            const int chunk = i / (TILES * 3), tile = i / 3 % TILES, kx = i % 3;
            uint32_t a[4];
            load_matrices(a, row + (16 * tile + kx + lane % 16) * STEP<C> + 16 * chunk + lane / 16 * 8);
#pragma unroll
            for (int ky = 0; ky < 3; ++ky) {
                const uint32_t(&b)[4] = weights[chunk][3 * ky + kx];
                float(&d)[2][4] = sums[(phase + 3 - ky) % 3][tile];
                mma<__half>(d[0], a, b[0], b[1]);
                mma<__half>(d[1], a, b[2], b[3]);
            }
        }
    }

    // Completes row `phase` - 2. Calls `store` with the distance from the first of the thread's
    // cells and four channels. The sums are then those of row `phase` + 1.
    template <typename F> __device__ void finish(int phase, F store) {
        const int done = (phase + 1) % 3;
#pragma unroll
        for (int i = 0; i < TILES * 2; ++i) {
            float(&d)[2][4] = sums[done][i / 2];
            float *low = d[0] + i % 2 * 2, *high = d[1] + i % 2 * 2;
            store(8 * i, uint2{activated(low[0], low[1], slope), activated(high[0], high[1], slope)});
            low[0] = bias[0], low[1] = bias[1], high[0] = bias[2], high[1] = bias[3];
        }
    }
};

// One layer. A block computes a strip of CELLS * WARPS * 16 / C columns. Grid: (strips of columns,
// strips of rows).
template <int C> __device__ void stream(const Layer &p) {
    constexpr int GROUPS = C / CHANNELS, COLUMNS = CELLS * WARPS / GROUPS, WIDTH = COLUMNS + 2;
    __shared__ __align__(16) __half ring[SLOTS][WIDTH * STEP<C>];
    const int warp = threadIdx.x / 32, first = warp / GROUPS * CELLS, channel = warp % GROUPS * CHANNELS;
    const int left = blockIdx.x * COLUMNS, top = blockIdx.y * p.rows, x = left + first + threadIdx.x % 32 / 4;
    // Rows of the input, from the one above the strip to the one below it.
    const int count = min((int)p.rows, (int)p.height - top) + 2;
    const auto copy = [&](int row) {
        if (row < count) {
            copy_row<C, WIDTH, 32 * WARPS>(ring[row % SLOTS], p, left - 1, top - 1 + row);
        }
        commit_copies();
    };
    for (int row = 0; row < SLOTS - 1; ++row) {
        copy(row);
    }
    Rows<C> rows(p.weights, p.bias, channel, p.slope);
    __half *to = p.output + ((size_t)top * p.width + x) * C + channel + threadIdx.x % 4 * 4;
    for (int begin = 0;; begin += 3) {
#pragma unroll
        for (int phase = 0; phase < 3; ++phase) {
            const int row = begin + phase;
            if (row == count) {
                return;
            }
            wait_copies<SLOTS - 2>();
            __syncthreads();
            // All warps have read the slot of the previous row.
            copy(row + SLOTS - 1);
            rows.add(ring[row % SLOTS] + first * STEP<C>, phase);
            rows.finish(phase, [&](int cell, uint2 channels) {
                if (row >= 2 && x + cell < (int)p.width) {
                    *reinterpret_cast<uint2 *>(to + cell * C) = channels;
                }
            });
            to += row >= 2 ? p.width * C : 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) row16(const __grid_constant__ Layer p) { stream<16>(p); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) row32(const __grid_constant__ Layer p) { stream<32>(p); }

// Two layers of 16 channels. The first half of the warps computes the first layer into shared
// memory, and the second half the second layer, one row later.
extern "C" __global__ void __launch_bounds__(64 * WARPS) fused16(const __grid_constant__ Layer p) {
    constexpr int C = 16, COLUMNS = CELLS * WARPS - 2, WIDTH = COLUMNS + 4;
    __shared__ __align__(16) __half ring[SLOTS][WIDTH * STEP<C>];
    __shared__ __align__(16) __half between[2][WIDTH * STEP<C>];
    const int warp = threadIdx.x / 32, layer = warp / WARPS, first = warp % WARPS * CELLS;
    const int left = blockIdx.x * COLUMNS, top = blockIdx.y * p.rows;
    // The first of the thread's cells, and its column in the map.
    const int own = first + threadIdx.x % 32 / 4, x = left + own - (layer ? 0 : 1);
    const int part = threadIdx.x % 4 * 4;
    const int count = min((int)p.rows, (int)p.height - top) + 4;
    const auto copy = [&](int row) {
        if (row < count) {
            copy_row<C, WIDTH, 64 * WARPS>(ring[row % SLOTS], p, left - 2, top - 2 + row);
        }
        commit_copies();
    };
    for (int row = 0; row < SLOTS - 1; ++row) {
        copy(row);
    }
    Rows<C> rows(p.weights + layer * 9 * C * C, p.bias + layer * C, 0, p.slope);
    __half *to = p.output + ((size_t)top * p.width + x) * C + part;
    for (int begin = 0;; begin += 3) {
#pragma unroll
        for (int phase = 0; phase < 3; ++phase) {
            const int step = begin + phase;
            if (step == count + 1) {
                return;
            }
            wait_copies<SLOTS - 2>();
            __syncthreads();
            copy(step + SLOTS - 1);
            // The first row of the second layer is complete in step 2, so its number modulo 3 is that
            // of step 3.
            const int row = layer ? step - 3 : step;
            if (row < 0 || row >= (layer ? count - 2 : count)) {
                continue;
            }
            rows.add((layer ? between[(step + 1) % 2] : ring[step % SLOTS]) + first * STEP<C>, phase);
            rows.finish(phase, [&](int cell, uint2 channels) {
                if (row < 2) {
                    return;
                }
                if (layer == 0) {
                    // The second layer's input is zero outside of the map.
                    const bool inside = (uint32_t)(x + cell) < p.width && (uint32_t)(top - 3 + row) < p.height;
                    __half *at = between[step % 2] + (own + cell) * STEP<C> + part;
                    *reinterpret_cast<uint2 *>(at) = inside ? channels : uint2{0, 0};
                } else if (own + cell < COLUMNS && x + cell < (int)p.width) {
                    *reinterpret_cast<uint2 *>(to + cell * C) = channels;
                }
            });
            to += row >= 2 ? p.width * C : 0;
        }
    }
}

// ---- wgmma ----

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// Cells of a row in shared memory, of which the last two have no result, and rows there. A copy of
// the first row follows the last, so that any two consecutive rows are one matrix of 104 cells.
constexpr int GROUP_CELLS = 52, GROUP_COLUMNS = GROUP_CELLS - 2, GROUP_SLOTS = 6;
constexpr int GROUP_CHANNELS = 64, GROUP_THREADS = 128;
// Halves from one plane of eight channels to the next. The eight planes of a cell are in different
// banks. The padding holds the two cells that the last matrix reads after the last row.
constexpr int PLANE = (GROUP_SLOTS + 1) * GROUP_CELLS * 8 + 40;

// A layer of 64 channels. A warp has the weights of 16 output channels in registers. A product has
// the cells of two rows, moved by the tap, straight from the rows. Grid: (strips of columns, strips
// of rows); `rows` is even.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS) group64(const __grid_constant__ Layer p) {
    constexpr int C = GROUP_CHANNELS, TAPS = 9, CHUNKS = C / 16;
    __shared__ __align__(128) __half ring[C / 8 * PLANE];
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    const int left = blockIdx.x * GROUP_COLUMNS, top = blockIdx.y * p.rows;
    const int count = min((int)p.rows, (int)p.height - top);
    const auto copy = [&](int row) {
        constexpr int PIECES = C / 8;
        const int slot = row % GROUP_SLOTS, first = threadIdx.x / PIECES, plane = threadIdx.x % PIECES;
        const int x = left - 1 + first, y = top - 1 + row;
        const __half *from = p.input + ((long long)y * p.width + x) * C + plane * 8;
        __half *to = ring + plane * PLANE + (slot * GROUP_CELLS + first) * 8;
#pragma unroll
        for (int cell = 0; cell < GROUP_CELLS; cell += GROUP_THREADS / PIECES) {
            if (first + cell < GROUP_CELLS) {
                const bool inside = (uint32_t)y < p.height && (uint32_t)(x + cell) < p.width;
                const __half *piece = inside ? from + cell * C : p.input;
                copy_async(to + cell * 8, piece, inside);
                if (slot == 0) {
                    copy_async(to + (GROUP_SLOTS * GROUP_CELLS + cell) * 8, piece, inside);
                }
            }
        }
    };
    for (int row = 0; row < 4; ++row) {
        copy(row);
    }
    commit_copies();
    __half *const to = p.output + ((size_t)top * p.width + left) * C + 16 * warp + 2 * pair;
    uint32_t weights[TAPS * CHUNKS][4];
    float bias[2];
#pragma unroll
    for (int i = 0; i < TAPS * CHUNKS * 4; ++i) {
        // Rows 0 to 7 or 8 to 15 of the fragment, first or second eight input channels.
        const int row = i / 4 * C + 16 * warp + channel_of(i % 2, group);
        weights[i / 4][i % 4] = weights_at(p.weights + row * 16 + i / 2 % 2 * 8 + pair);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        bias[half] = p.bias[16 * warp + channel_of(half, group)];
    }
    for (int row = 0; row < count; row += 2) {
        wait_copies<0>();
        fence_tiles();
        __syncthreads();
        // All warps have read the slots of the first two of the previous four rows.
        if (row + 2 < count) {
            copy(row + 4);
            copy(row + 5);
        }
        commit_copies();
        float sums[GROUP_CELLS];
#pragma unroll
        for (int i = 0; i < GROUP_CELLS; ++i) {
            sums[i] = bias[i / 2 % 2];
        }
        begin_products(sums);
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) {
            const int slot = (row + ky) % GROUP_SLOTS;
            const Tile tile = tile_at(ring + slot * GROUP_CELLS * 8, PLANE * 2, 128);
#pragma unroll
            for (int i = 0; i < 3 * CHUNKS; ++i) {
                const int kx = i % 3, chunk = i / 3;
                group_product(sums, weights[chunk * TAPS + 3 * ky + kx], advanced(tile, chunk * 4 * PLANE + kx * 16));
            }
        }
        end_products(sums);
#pragma unroll
        for (int i = 0; i < GROUP_CELLS / 4; ++i) {
            const float *d = sums + 4 * i;
            const uint32_t low = activated(d[0], d[1], p.slope), high = activated(d[2], d[3], p.slope);
            const uint2 channels = {transposed(low), transposed(high)};
            const int cell = 8 * i + group, below = cell >= GROUP_CELLS, column = cell - below * GROUP_CELLS;
            if (column < GROUP_COLUMNS && left + column < (int)p.width && row + below < count) {
                *reinterpret_cast<uint2 *>(to + ((size_t)(row + below) * p.width + column) * C) = channels;
            }
        }
    }
}

#endif
