// Layers of networks on NHWC maps of 16-bit floats, for training and for ResShift models. Every
// kernel takes one structure by value, which mirrors one in params.rs. Sums are in f32, in an order
// that does not depend on the device.

#include "warp.cuh"

// ---- Parameters of the host (params.rs) ----

// Sizes of a convolution of a map that is upsampled by 2^up.
struct Shape {
    uint32_t n, h, w, ci, oh, ow, co, kh, kw, stride, pad, up;
};

struct Conv {
    const void *x;      // [n][h][w][ci]
    const void *weight; // [co][kh][kw][ci]
    const float *bias;  // [co]
    // Added after the activation, with the layout of y; or null.
    const void *residual;
    void *y; // [n][oh][ow][co]
    Shape shape;
    // 0 for none, 1 for the leaky ReLU, 2 for the SiLU.
    uint32_t activation;
    float slope;
    // True if taps are in reverse order, for gradients.
    uint32_t reversed, unused;
};

// Partial sums over `step` outputs of the gradients with respect to weights and bias.
struct WeightGrad {
    const void *x;   // [n][h][w][ci]
    const void *dy;  // [n][oh][ow][co]
    float *partials; // [blocks]: [co][kh][kw][ci], then [co]
    Shape shape;
    uint32_t step, unused;
};

// Group normalisation.
struct Norm {
    const void *x; // [n][pixels][c]
    // [c], or [n][c] with `affine` = c instead of 0.
    const float *weight, *bias;
    float *partials; // [n][chunks][groups][2]: sums of values and of squares
    void *y;         // as x
    uint32_t n, pixels, c, groups, chunks, affine;
    // As in Conv.
    uint32_t activation;
    float eps;
};

// Attention within windows of 64 pixels.
struct Attention {
    const void *qkv;   // [n][h][w][3][heads][d]
    const float *bias; // [heads][64][64], or null
    void *y;           // [n][h][w][heads][d]
    uint32_t n, h, w, heads, window_h, window_w, shift;
    // Factor of the scores.
    float scale;
};

static_assert(sizeof(Conv) == 104 && sizeof(WeightGrad) == 80 && sizeof(Norm) == 72 && sizeof(Attention) == 56,
              "as in params.rs");

// ---- Numbers ----

template <typename T> __device__ inline T to(float v);
template <> __device__ inline __half to<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 to<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

__device__ inline float number(__half v) { return __half2float(v); }
__device__ inline float number(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> struct alignas(4) Pair {
    T x, y;
};

template <typename T> struct alignas(16) Eight {
    T values[8];
};

template <typename T> __device__ inline uint32_t pack(float x, float y) {
    const Pair<T> pair{to<T>(x), to<T>(y)};
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

__device__ inline float activate(float v, uint32_t activation, float slope) {
    switch (activation) {
    case 1:
        return fmaxf(v, v * slope);
    case 2:
        return v / (1.0f + __expf(-v));
    default:
        return v;
    }
}

// ---- Convolution as a product of matrices ----
//
// Forward: outputs x (taps and channels) times (taps and channels) x channels. The first matrix,
// the patches, is not stored: its rows are gathered from the map, 8 channels of a tap at a time.
// The gradient with respect to the input is the same with flipped weights. That with respect to the
// weights sums over the outputs.

constexpr int THREADS = 128, STAGES = 3;

// Position of vector v in a row of V vectors of 8 halves in shared memory. The v-th vectors of 8
// rows are in different banks.
template <int V> __device__ inline int swizzle(int row, int v) {
    static_assert(V == 2 || V == 4 || V == 8, "rows of 32, 64 or 128 bytes");
    return row * V + (v ^ row / (8 / V) % V);
}

// The window of an output in the map.
template <typename T> struct Window {
    const T *map;
    int y, x;

    // Output `index` of `count` in row order. Without such an output, a window outside the map.
    __device__ Window(const void *maps, const Shape &s, uint32_t index, uint32_t count) {
        const bool valid = index < count;
        index = valid ? index : 0;
        const uint32_t pixels = s.oh * s.ow, image = index / pixels, at = index % pixels;
        map = (const T *)maps + (size_t)image * s.h * s.w * s.ci;
        y = valid ? (int)(at / s.ow * s.stride) - (int)s.pad : -(1 << 30);
        x = (int)(at % s.ow * s.stride) - (int)s.pad;
    }
};

// Position of 8 channels of a tap in a patch.
struct Tap {
    int y, x;
    uint32_t channel;
    bool valid;

    __device__ Tap(const Shape &s, uint32_t k) {
        const uint32_t tap = k / s.ci;
        y = tap / s.kw;
        x = tap % s.kw;
        channel = k % s.ci;
        valid = k < s.kh * s.kw * s.ci;
    }
};

template <typename T>
__device__ inline void gather(void *to, const Shape &s, const Window<T> &window, const Tap &tap) {
    const int y = window.y + tap.y, x = window.x + tap.x;
    const bool inside = tap.valid && (uint32_t)y < s.h << s.up && (uint32_t)x < s.w << s.up;
    const T *from = window.map;
    if (inside) {
        from += ((size_t)(y >> s.up) * s.w + (x >> s.up)) * s.ci + tap.channel;
    }
    copy_async(to, from, inside);
}

// A block computes 128 outputs of N channels, divided among ROWS x (4 / ROWS) warps.
template <typename T, int N, int ROWS> __device__ inline void convolve(const Conv &p) {
    constexpr int M = 128, V = 4, TILES_M = M / ROWS / 16, TILES_N = N * ROWS / 4 / 8;
    static_assert(TILES_N % 2 == 0, "weights are loaded for 16 channels at once");
    __shared__ uint4 patches[STAGES][M * V], weights[STAGES][N * V];
    const Shape &s = p.shape;
    const uint32_t count = s.n * s.oh * s.ow, length = s.kh * s.kw * s.ci;
    const uint32_t first = blockIdx.x * M, channel = blockIdx.y * N;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_m = warp % ROWS * (M / ROWS), warp_n = warp / ROWS * (N * ROWS / 4);
    const int v = thread % V, row = thread / V;
    const Window<T> windows[4] = {{p.x, s, first + row, count},
                                  {p.x, s, first + row + 32, count},
                                  {p.x, s, first + row + 64, count},
                                  {p.x, s, first + row + 96, count}};

    const uint32_t chunks = (length + 8 * V - 1) / (8 * V);
    const auto load = [&](uint32_t chunk) {
        if (chunk < chunks) {
            const int stage = chunk % STAGES;
            const uint32_t k = chunk * 8 * V + v * 8;
            Tap tap(s, k);
            if (p.reversed) {
                tap.y = s.kh - 1 - tap.y;
                tap.x = s.kw - 1 - tap.x;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                gather(&patches[stage][swizzle<V>(row + 32 * i, v)], s, windows[i], tap);
            }
#pragma unroll
            for (int i = 0; i < (N + 31) / 32; ++i) {
                const uint32_t to = row + 32 * i, from = channel + to;
                if (to < N) {
                    const bool valid = from < s.co && k < length;
                    const T *weight = (const T *)p.weight + (valid ? (size_t)from * length + k : 0);
                    copy_async(&weights[stage][swizzle<V>(to, v)], weight, valid);
                }
            }
        }
        commit_copies();
    };

    float sums[TILES_M][TILES_N][4] = {};
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        load(stage);
    }
    for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
        wait_copies<STAGES - 2>();
        // All copies are complete, and the target of the next ones has been read.
        __syncthreads();
        load(chunk + STAGES - 1);
        const int stage = chunk % STAGES;
#pragma unroll
        for (int half = 0; half < V / 2; ++half) {
            uint32_t a[TILES_M][4];
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                load_matrices(a[m], &patches[stage][swizzle<V>(warp_m + 16 * m + lane % 16, 2 * half + lane / 16)]);
            }
#pragma unroll
            for (int n = 0; n < TILES_N; n += 2) {
                uint32_t b[4];
                load_matrices(b, &weights[stage][swizzle<V>(warp_n + 8 * n + lane / 16 * 8 + lane % 8,
                                                          2 * half + lane / 8 % 2)]);
#pragma unroll
                for (int m = 0; m < TILES_M; ++m) {
                    mma<T>(sums[m][n], a[m], b[0], b[1]);
                    mma<T>(sums[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t index = first + warp_m + 16 * m + 8 * half + lane / 4;
            if (index >= count) {
                continue;
            }
            T *y = (T *)p.y + (size_t)index * s.co;
            const T *residual = p.residual ? (const T *)p.residual + (size_t)index * s.co : nullptr;
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                const uint32_t c = channel + warp_n + 8 * n + lane % 4 * 2;
                const auto value = [&](int i, float more) {
                    return activate(sums[m][n][2 * half + i] + p.bias[c + i], p.activation, p.slope) + more;
                };
                if (s.co % 2 == 0) {
                    if (c < s.co) {
                        const Pair<T> more = residual ? *(const Pair<T> *)(residual + c) : Pair<T>{to<T>(0), to<T>(0)};
                        *(Pair<T> *)(y + c) = {to<T>(value(0, number(more.x))), to<T>(value(1, number(more.y)))};
                    }
                    continue;
                }
                for (int i = 0; i < 2; ++i) {
                    if (c + i < s.co) {
                        y[c + i] = to<T>(value(i, residual ? number(residual[c + i]) : 0.0f));
                    }
                }
            }
        }
    }
}

// A block sums over `step` outputs for N channels of the result and 64 elements of a patch. The
// first blocks also sum the bias. It has ROWS x (4 / ROWS) warps.
template <typename T, int N, int ROWS> __device__ inline void wgrad(const WeightGrad &p) {
    constexpr int DEPTH = 32, K = 64, V_DY = N / 8, V_X = K / 8;
    constexpr int TILES_M = N / ROWS / 16, TILES_N = K * ROWS / 4 / 8;
    static_assert(TILES_M > 0 && TILES_N % 2 == 0, "loaded by 16 at once");
    __shared__ uint4 dys[STAGES][DEPTH * V_DY], xs[STAGES][DEPTH * V_X];
    const Shape &s = p.shape;
    const uint32_t length = s.kh * s.kw * s.ci;
    const uint32_t k = blockIdx.x * K, channel = blockIdx.y * N;
    const uint32_t begin = blockIdx.z * p.step, end = min(begin + p.step, s.n * s.oh * s.ow);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int warp_m = warp % ROWS * (N / ROWS), warp_n = warp / ROWS * (K * ROWS / 4);
    const Tap tap(s, k + thread % V_X * 8);

    const uint32_t chunks = (end - begin + DEPTH - 1) / DEPTH;
    const auto load = [&](uint32_t chunk) {
        if (chunk < chunks) {
            const int stage = chunk % STAGES;
            const uint32_t from = begin + chunk * DEPTH;
#pragma unroll
            for (int i = thread; i < DEPTH * V_DY; i += THREADS) {
                const int row = i / V_DY, v = i % V_DY;
                const bool valid = from + row < end && channel + 8 * v < s.co;
                const T *dy = (const T *)p.dy + (valid ? (size_t)(from + row) * s.co + channel + 8 * v : 0);
                copy_async(&dys[stage][swizzle<V_DY>(row, v)], dy, valid);
            }
#pragma unroll
            for (int row = thread / V_X; row < DEPTH; row += THREADS / V_X) {
                gather(&xs[stage][swizzle<V_X>(row, thread % V_X)], s, Window<T>(p.x, s, from + row, end), tap);
            }
        }
        commit_copies();
    };

    float sums[TILES_M][TILES_N][4] = {}, bias = 0.0f;
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        load(stage);
    }
    for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        load(chunk + STAGES - 1);
        const int stage = chunk % STAGES;
        if (blockIdx.x == 0 && thread < N) {
            for (int row = 0; row < DEPTH; ++row) {
                bias += number(((const T *)&dys[stage][swizzle<V_DY>(row, thread / 8)])[thread % 8]);
            }
        }
#pragma unroll
        for (int half = 0; half < DEPTH / 16; ++half) {
            // The rows of both matrices are outputs, so both are transposed on loading.
            uint32_t a[TILES_M][4];
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                const int row = 16 * half + lane / 16 * 8 + lane % 8;
                load_transposed(a[m], &dys[stage][swizzle<V_DY>(row, (warp_m + 16 * m) / 8 + lane / 8 % 2)]);
            }
#pragma unroll
            for (int n = 0; n < TILES_N; n += 2) {
                uint32_t b[4];
                const int row = 16 * half + lane % 16;
                load_transposed(b, &xs[stage][swizzle<V_X>(row, warp_n / 8 + n + lane / 16)]);
#pragma unroll
                for (int m = 0; m < TILES_M; ++m) {
                    mma<T>(sums[m][n], a[m], b[0], b[1]);
                    mma<T>(sums[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    float *partial = p.partials + (size_t)blockIdx.z * s.co * (length + 1);
    if (blockIdx.x == 0 && thread < N && channel + thread < s.co) {
        partial[(size_t)s.co * length + channel + thread] = bias;
    }
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t c = channel + warp_m + 16 * m + 8 * half + lane / 4;
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                // The length of a patch is a multiple of 8, so both elements are in it or none.
                const uint32_t at = k + warp_n + 8 * n + lane % 4 * 2;
                if (c < s.co && at < length) {
                    *(float2 *)(partial + (size_t)c * length + at) = make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
                }
            }
        }
    }
}

// ---- Group normalisation ----

constexpr int NORM_THREADS = 256, MOST_CHANNELS = 8 * NORM_THREADS;

// Returns the value that moments of a group are relative to. Without it, the squares of values far
// from 0 would hide a small deviation.
template <typename T> __device__ inline float first_of_group(const Norm &p, uint32_t sample, uint32_t group) {
    return number(((const T *)p.x)[(size_t)sample * p.pixels * p.c + group * (p.c / p.groups)]);
}

// A block sums a chunk of a sample's pixels. A thread sums 8 channels of a subset of the pixels.
template <typename T> __device__ inline void add_up(const Norm &p) {
    __shared__ float sums[2][MOST_CHANNELS];
    const uint32_t vectors = p.c / 8, rows = NORM_THREADS / vectors;
    const uint32_t vector = threadIdx.x % vectors, row = threadIdx.x / vectors, sample = blockIdx.y;
    const uint32_t step = (p.pixels + p.chunks - 1) / p.chunks, each = p.c / p.groups;
    const uint32_t begin = blockIdx.x * step, end = min(begin + step, p.pixels);
    if (row < rows) {
        float sum[8] = {}, squares[8] = {}, first[8];
        for (int i = 0; i < 8; ++i) {
            first[i] = first_of_group<T>(p, sample, (8 * vector + i) / each);
        }
        for (uint32_t pixel = begin + row; pixel < end; pixel += rows) {
            const Eight<T> x = ((const Eight<T> *)p.x)[((size_t)sample * p.pixels + pixel) * vectors + vector];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float v = number(x.values[i]) - first[i];
                sum[i] += v;
                squares[i] += v * v;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            sums[0][row * p.c + 8 * vector + i] = sum[i];
            sums[1][row * p.c + 8 * vector + i] = squares[i];
        }
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < 2 * p.groups; i += NORM_THREADS) {
        float sum = 0.0f;
        for (uint32_t r = 0; r < rows; ++r) {
            for (uint32_t c = 0; c < each; ++c) {
                sum += sums[i % 2][r * p.c + i / 2 * each + c];
            }
        }
        p.partials[((size_t)sample * p.chunks + blockIdx.x) * p.groups * 2 + i] = sum;
    }
}

// A block normalises every gridDim.x-th group of 256 vectors of 8 channels of a sample.
template <typename T> __device__ inline void normalise(const Norm &p) {
    __shared__ float means[NORM_THREADS], factors[NORM_THREADS];
    const uint32_t vectors = p.c / 8, each = p.c / p.groups, sample = blockIdx.y;
    if (threadIdx.x < p.groups) {
        float sum = 0.0f, squares = 0.0f;
        for (uint32_t chunk = 0; chunk < p.chunks; ++chunk) {
            const float *part = p.partials + (((size_t)sample * p.chunks + chunk) * p.groups + threadIdx.x) * 2;
            sum += part[0];
            squares += part[1];
        }
        const float count = (float)p.pixels * (float)each, mean = sum / count;
        means[threadIdx.x] = first_of_group<T>(p, sample, threadIdx.x) + mean;
        factors[threadIdx.x] = rsqrtf(fmaxf(squares / count - mean * mean, 0.0f) + p.eps);
    }
    __syncthreads();
    const float *weight = p.weight + (size_t)sample * p.affine, *bias = p.bias + (size_t)sample * p.affine;
    const uint32_t count = p.pixels * vectors;
    for (uint32_t i = blockIdx.x * NORM_THREADS + threadIdx.x; i < count; i += gridDim.x * NORM_THREADS) {
        const size_t at = (size_t)sample * count + i;
        const Eight<T> x = ((const Eight<T> *)p.x)[at];
        Eight<T> y;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const uint32_t channel = i % vectors * 8 + k, group = channel / each;
            const float v = (number(x.values[k]) - means[group]) * factors[group] * weight[channel] + bias[channel];
            y.values[k] = to<T>(activate(v, p.activation, 0.0f));
        }
        ((Eight<T> *)p.y)[at] = y;
    }
}

// ---- Attention within windows ----

// A block computes a head of a window, a warp computes 16 of its 64 queries.
template <typename T, int D> __device__ inline void attend(const Attention &p) {
    constexpr int L = 64, V = D / 8;
    __shared__ uint4 qkv[3][L * V];
    __shared__ size_t pixels[L];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, head = blockIdx.y;
    const uint32_t rows = p.h / p.window_h, columns = p.w / p.window_w;
    const uint32_t column = blockIdx.x % columns, row = blockIdx.x / columns % rows, sample = blockIdx.x / columns / rows;
    if (thread < L) {
        // The map is rolled up and left by the shift.
        const uint32_t y = (row * p.window_h + thread / p.window_w + p.shift) % p.h;
        const uint32_t x = (column * p.window_w + thread % p.window_w + p.shift) % p.w;
        pixels[thread] = ((size_t)sample * p.h + y) * p.w + x;
    }
    __syncthreads();
    for (int i = thread; i < 3 * L * V; i += THREADS) {
        const int which = i / (L * V), pixel = i / V % L, v = i % V;
        const uint4 *from = (const uint4 *)p.qkv + (pixels[pixel] * 3 + which) * p.heads * V + head * V + v;
        qkv[which][swizzle<V>(pixel, v)] = *from;
    }
    __syncthreads();

    // Scores of queries 16 warp + lane / 4 and that plus 8, and of keys 8 n + lane % 4 * 2 and the
    // next.
    float scores[L / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        uint32_t q[4];
        load_matrices(q, &qkv[0][swizzle<V>(16 * warp + lane % 16, 2 * d + lane / 16)]);
#pragma unroll
        for (int n = 0; n < L / 8; n += 2) {
            uint32_t k[4];
            load_matrices(k, &qkv[1][swizzle<V>(8 * n + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2)]);
            mma<T>(scores[n], q, k[0], k[1]);
            mma<T>(scores[n + 1], q, k[2], k[3]);
        }
    }
    // Only the lowest row of windows is masked, between its right columns and the others.
    const bool masked = p.shift > 0 && row + 1 == rows;
    float sums[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int query = 16 * warp + 8 * half + lane / 4;
        const bool right = query % p.window_w + p.shift >= p.window_w;
        const float *bias = p.bias ? p.bias + ((size_t)head * L + query) * L : nullptr;
        float most = -3e38f;
#pragma unroll
        for (int n = 0; n < L / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int key = 8 * n + lane % 4 * 2 + i;
                float score = scores[n][2 * half + i] * p.scale + (bias ? bias[key] : 0.0f);
                if (masked && (key % p.window_w + p.shift >= p.window_w) != right) {
                    score -= 100.0f;
                }
                scores[n][2 * half + i] = score;
                most = fmaxf(most, score);
            }
        }
        // Reduces over the four lanes of a query.
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < L / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float share = __expf(scores[n][2 * half + i] - most);
                scores[n][2 * half + i] = share;
                sum += share;
            }
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sums[half] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
    }

    float values[D / 8][4] = {};
#pragma unroll
    for (int k = 0; k < L / 16; ++k) {
        const uint32_t shares[4] = {
            pack<T>(scores[2 * k][0], scores[2 * k][1]), pack<T>(scores[2 * k][2], scores[2 * k][3]),
            pack<T>(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack<T>(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t v[4];
            load_transposed(v, &qkv[2][swizzle<V>(16 * k + lane % 16, d + lane / 16)]);
            mma<T>(values[d], shares, v[0], v[1]);
            mma<T>(values[d + 1], shares, v[2], v[3]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const size_t pixel = pixels[16 * warp + 8 * half + lane / 4];
        T *y = (T *)p.y + (pixel * p.heads + head) * D;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
            const float *v = values[d] + 2 * half;
            *(uint32_t *)(y + 8 * d + lane % 4 * 2) = pack<T>(v[0] / sums[half], v[1] / sums[half]);
        }
    }
}

#define KERNEL(threads, name, type, run)                                                                               \
    extern "C" __global__ void __launch_bounds__(threads) tadsr_##name(const __grid_constant__ type p) { run(p); }

#define LAYERS(T, name)                                                                                                \
    KERNEL(THREADS, conv16_##name, Conv, (convolve<T, 16, 4>))                                                         \
    KERNEL(THREADS, conv32_##name, Conv, (convolve<T, 32, 4>))                                                         \
    KERNEL(THREADS, conv64_##name, Conv, (convolve<T, 64, 2>))                                                         \
    KERNEL(THREADS, wgrad16_##name, WeightGrad, (wgrad<T, 16, 1>))                                                      \
    KERNEL(THREADS, wgrad32_##name, WeightGrad, (wgrad<T, 32, 2>))                                                      \
    KERNEL(THREADS, wgrad64_##name, WeightGrad, (wgrad<T, 64, 2>))                                                      \
    KERNEL(NORM_THREADS, moments_##name, Norm, add_up<T>)                                                              \
    KERNEL(NORM_THREADS, norm_##name, Norm, normalise<T>)                                                              \
    KERNEL(THREADS, attention16_##name, Attention, (attend<T, 16>))                                                    \
    KERNEL(THREADS, attention32_##name, Attention, (attend<T, 32>))

// Grids: conv (blocks of outputs, blocks of channels); weights (blocks of a patch, blocks of
// channels, blocks of outputs); moments (chunks, samples); norm (blocks, samples); attention
// (windows, heads).
LAYERS(__half, f16)
LAYERS(__nv_bfloat16, bf16)

#undef KERNEL
#undef LAYERS
