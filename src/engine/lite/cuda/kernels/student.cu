// Kernels of a student: unpack, convolve, pack. Each layer is one launch. Every kernel takes one
// structure by value, which mirrors one in params.rs.
//
// The latent has a margin of as many cells as there are layers, filled with the repeated border of
// the frame. Each convolution returns a map that is one cell smaller on every side, so the last one
// is the grid of the frame, and no convolution has a special case for the border. A band of rows is
// a latent that begins further down. If chroma is interpolated to the size of the frame, the
// residual has a margin of one cell, because the interpolation reads across the border of a band.

#include "../../../../ops/cuda/kernels/warp.cuh"

// ---- Parameters (params.rs) ----

constexpr uint32_t NO_SLOT = 0xffffffffu, NO_FILLER = 0xffffffffu;

// Samples of the input frame: layout and resampling.
struct Samples {
    const uint8_t *src;
    // First source sample and `taps` weights of each resampled sample.
    const uint32_t *x_starts;
    const float *x_weights;
    const uint32_t *y_starts;
    const float *y_weights;
    // Bytes from row to row, from sample to sample, and before the first sample.
    uint32_t stride, step, offset;
    uint32_t x_taps, y_taps;
    // Bytes of a sample (1 or 2). Its code is (word >> shift) & mask.
    uint32_t bytes, shift, mask;
    // Groups of eight source samples in a row of a tile, and 2^32 divided by it, rounded up. They
    // are 0 if the samples are not computed in tiles.
    uint32_t groups, reciprocal;
};

// Components in planes of the latent, resampled to the size of the planes, and their weight: one
// component, or both that share the plane of the frame.
struct Source {
    Samples samples;
    uint32_t slots[2];
    float weight;
    uint32_t tile;
};

// A component of the output frame, or both that share a plane: its base and its memory, which has
// the layout of the base except for the stride.
struct Component {
    Samples base;
    uint8_t *dst;
    uint32_t stride;
    // Samples in a row, and the rows that this band writes.
    uint32_t width, top, rows;
    // Planes of the latent that are added without resampling, and factors of the chroma planes,
    // which are added at the size of the frame.
    uint32_t slots[2];
    float gains[2];
    // Codes per unit of the residual.
    float scale;
    // Last sample of a row that is shown. Those after it repeat it: luma of YUY2 in odd widths.
    uint32_t last;
    uint32_t tile, unused;
};

// A plane of the latent: its first channel, the side of a cell in samples, its size in samples.
struct Slot {
    uint32_t channel, r, width, height;
};

struct Frame {
    Component components[4];
    Source sources[9];
    Slot slots[3];
    // Tables from the chroma planes of the latent to the size of the frame.
    const uint32_t *x_starts;
    const float *x_weights;
    const uint32_t *y_starts;
    const float *y_weights;
    // Factor and offset from the weighted codes of each channel to the latent, and scale of the
    // residual. The strength is read when the kernel runs, so one graph works for all values.
    const float *gain, *bias, *residual_std, *strength;
    __half *latent;
    const __half *residual;
    // Cells in a row and rows of the latent with both margins, and the row of its first cell in the
    // frame.
    uint32_t latent_width, latent_height;
    int32_t latent_top;
    uint32_t margin;
    // Cells in a row of the residual with margins, the row of its first cell in the frame, and the
    // width of a margin.
    uint32_t residual_width;
    int32_t residual_top;
    uint32_t residual_margin;
    // Channels of latent and residual with padding.
    uint32_t channels;
    uint32_t slot_count, component_count, source_count;
    // Components and sources that are computed in tiles. They are the first.
    uint32_t tiled_components, tiled_sources;
    // Taps of the tables above.
    uint32_t x_taps, y_taps;
    // Byte of a pixel that is 255, or NO_FILLER.
    uint32_t filler;
};

struct Conv {
    const __half *input;   // [in_height][in_width][ci]
    const __half *weights; // [ci / 16][9][co][16], for four input channels [3][co][16]
    const float *bias;     // [co]
    // Rows of skip_width cells of co channels from the first cell of the output on, or null.
    const __half *skip;
    __half *output;        // [in_height - 2][in_width - 2][co]
    uint32_t in_width, in_height, ci, co, skip_width;
    float slope;
};

static_assert(sizeof(Samples) == 80 && sizeof(Source) == 96 && sizeof(Component) == 136 && sizeof(Frame) == 1600 &&
                  sizeof(Conv) == 64,
              "sizes of params.rs");

// ---- Planes to latent, residual to planes: tiles ----
//
// The usual case: samples with four taps in both directions, in planes of one component or of both
// chroma components, and cells of 2 x 2 or 4 x 4 samples. A block resamples the source rows of a
// tile vertically into shared memory. Then each thread resamples 16 samples horizontally.

constexpr int TILE_THREADS = 256, TILE_SAMPLES = 256, TILE_ROWS = 16;
// Rows of a thread, which computes four samples in each.
constexpr int PART = 4;
// Source samples that a thread resamples vertically at once, and the maximum in a row of a tile.
constexpr int GROUP = 8, LINE = 34 * GROUP;

template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T v[N];
};

// Loads a value that the kernel does not write.
template <typename V> __device__ V read_only(const void *at) {
    V value;
    if constexpr (sizeof(V) == 4) {
        const uint32_t bits = __ldg(static_cast<const uint32_t *>(at));
        memcpy(&value, &bits, 4);
    } else if constexpr (sizeof(V) == 8) {
        const uint2 bits = __ldg(static_cast<const uint2 *>(at));
        memcpy(&value, &bits, 8);
    } else {
        static_assert(sizeof(V) % 16 == 0, "sizes of loads");
        for (size_t i = 0; i < sizeof(V) / 16; ++i) {
            const uint4 bits = __ldg(static_cast<const uint4 *>(at) + i);
            memcpy(reinterpret_cast<char *>(&value) + 16 * i, &bits, 16);
        }
    }
    return value;
}

// 2^23. Its float has the bits of a whole number below it, once added, as the last bits. GPUs add
// faster than they convert.
constexpr float LAST_BITS = 8388608.0f;

// Returns code `i` of a group of words of type T.
template <typename T> __device__ float decoded(const Vector<uint32_t, GROUP * sizeof(T) / 4> &words, int i, const Samples &c) {
    uint32_t bits;
    if constexpr (sizeof(T) == 1) {
        bits = __byte_perm(words.v[i / 4], 0x4b000000, 0x7440 + i % 4);
    } else {
        const uint32_t pair = words.v[i / 2] >> c.shift & c.mask * 0x10001;
        bits = __byte_perm(pair, 0x4b000000, i % 2 ? 0x7432 : 0x7410);
    }
    return __uint_as_float(bits) - LAST_BITS;
}

// Returns the word of a code.
template <typename T> __device__ T encoded(float code, const Samples &c) {
    const float max = sizeof(T) == 1 ? 255.0f : (float)c.mask;
    const uint32_t bits = __float_as_uint(fminf(fmaxf(code, 0.0f), max) + LAST_BITS);
    return (T)(sizeof(T) == 1 ? bits : bits << c.shift);
}

// Resamples the rows of a tile vertically, from row `top` of the result on. Rows after `last`
// repeat it. The tile begins with the group `first` of a source row.
template <typename T>
__device__ void fill_tile(float *lines, const Samples &c, uint32_t first, int top, int last) {
    constexpr uint32_t BYTES = GROUP * sizeof(T);
    for (uint32_t i = threadIdx.x; i < c.groups * TILE_ROWS; i += TILE_THREADS) {
        const uint32_t row = __umulhi(i, c.reciprocal), group = i - row * c.groups;
        const int y = min(max(top + (int)row, 0), last);
        // The padding of a row ends with a whole group.
        const uint32_t at = min((first + group) * BYTES, c.stride - BYTES);
        const uint8_t *from = c.src + (size_t)__ldg(c.y_starts + y) * c.stride + at;
        const auto weights = read_only<Vector<float, 4>>(c.y_weights + 4 * y);
        Vector<float, GROUP> sums = {};
#pragma unroll
        for (int j = 0; j < 4; ++j, from += c.stride) {
            const auto words = read_only<Vector<uint32_t, BYTES / 4>>(from);
#pragma unroll
            for (int n = 0; n < GROUP; ++n) {
                sums.v[n] += weights.v[j] * decoded<T>(words, n, c);
            }
        }
        *reinterpret_cast<Vector<float, GROUP> *>(lines + row * LINE + group * GROUP) = sums;
    }
}

// Returns the group of the first source sample of a tile that begins with column `x`.
template <int C> __device__ uint32_t first_group(const Samples &c, int x, int last) {
    return __ldg(c.x_starts + min(max(x, 0), last)) * C / GROUP;
}

// Place of a thread in a tile. It computes rows from `row` on, of CELLS cells of R x R samples of C
// alternating components, which are 32 cells apart. So threads of a warp access adjacent samples.
template <int C, int R> struct Place {
    static constexpr int CELLS = 4 / (C * R), APART = 32 * R, WIDTH = TILE_SAMPLES / C;
    const int x = (threadIdx.x / 32 % 2 * CELLS * 32 + threadIdx.x % 32) * R, row = threadIdx.x / 64 * PART;
};

// Samples of a tile's rows and weights, for the columns of a thread.
template <int C, int R> struct Columns {
    static constexpr int CELLS = Place<C, R>::CELLS;
    uint32_t starts[CELLS][R];
    Vector<float, 4> weights[CELLS][R];

    __device__ Columns(const Samples &c, uint32_t first, int x, int last) {
#pragma unroll
        for (int i = 0; i < CELLS * R; ++i) {
            const int column = min(max(x + i / R * Place<C, R>::APART + i % R, 0), last);
            starts[i / R][i % R] = __ldg(c.x_starts + column) * C - first * GROUP;
            weights[i / R][i % R] = read_only<Vector<float, 4>>(c.x_weights + 4 * column);
        }
    }

    // Adds the samples in column `k` of a cell to `sums`.
    __device__ void add(float (&sums)[C], const float *line, int cell, int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto pixel = *reinterpret_cast<const Vector<float, C> *>(line + starts[cell][k] + i * C);
#pragma unroll
            for (int n = 0; n < C; ++n) {
                sums[n] += weights[cell][k].v[i] * pixel.v[n];
            }
        }
    }
};

template <typename T, int C, int R> __device__ void unpack_tile(const Frame &f, const Source &s, float *lines) {
    using Cell = Vector<__half, R * R>;
    const Place<C, R> place;
    if (blockIdx.x * place.WIDTH >= f.latent_width * R || blockIdx.y * TILE_ROWS >= f.latent_height * R) {
        return;
    }
    const Slot &slot = f.slots[s.slots[0]];
    const int right = (int)slot.width - 1, bottom = (int)slot.height - 1;
    const int left = (int)(blockIdx.x * place.WIDTH) - (int)f.margin * R;
    const int top = (int)(blockIdx.y * TILE_ROWS) + f.latent_top * R;
    const uint32_t first = first_group<C>(s.samples, left, right);
    fill_tile<T>(lines, s.samples, first, top, bottom);
    __syncthreads();
    const uint32_t x = (blockIdx.x * place.WIDTH + place.x) / R;
    if (x >= f.latent_width) {
        return;
    }
    const Columns<C, R> columns(s.samples, first, left + place.x, right);
    Vector<float, R * R> gain[C], bias[C];
    __half *to[C];
    uint32_t y = (blockIdx.y * TILE_ROWS + place.row) / R;
#pragma unroll
    for (int n = 0; n < C; ++n) {
        const uint32_t channel = f.slots[s.slots[n]].channel;
        gain[n] = read_only<Vector<float, R * R>>(f.gain + channel);
        bias[n] = read_only<Vector<float, R * R>>(f.bias + channel);
        to[n] = f.latent + ((size_t)y * f.latent_width + x) * f.channels + channel;
    }
#pragma unroll
    for (int row = 0; row < PART; row += R, ++y) {
        if (y >= f.latent_height) {
            return;
        }
#pragma unroll
        for (int i = 0; i < place.CELLS; ++i) {
            Cell out[C];
#pragma unroll
            for (int k = 0; k < R * R; ++k) {
                float sums[C] = {};
                columns.add(sums, lines + (place.row + row + k / R) * LINE, i, k % R);
#pragma unroll
                for (int n = 0; n < C; ++n) {
                    out[n].v[k] = __float2half_rn(sums[n] * (s.weight * gain[n].v[k]) + bias[n].v[k]);
                }
            }
            if (x + 32 * i < f.latent_width) {
#pragma unroll
                for (int n = 0; n < C; ++n) {
                    *reinterpret_cast<Cell *>(to[n] + 32 * i * f.channels) = out[n];
                }
            }
        }
#pragma unroll
        for (int n = 0; n < C; ++n) {
            to[n] += (size_t)f.latent_width * f.channels;
        }
    }
}

template <typename T, int C, int R> __device__ void pack_tile(const Frame &f, const Component &c, float *lines) {
    using Cell = Vector<__half, R * R>;
    const Place<C, R> place;
    const uint32_t left = blockIdx.x * place.WIDTH, top = blockIdx.y * TILE_ROWS;
    if (left >= c.width || top >= c.rows) {
        return;
    }
    const uint32_t x = left + place.x, y = c.top + top + place.row, end = c.top + c.rows;
    // The residual arrives while the block fills the tile.
    const float strength = __ldg(f.strength), factor = strength * c.scale;
    const bool adds = strength > 0.0f && c.slots[0] != NO_SLOT;
    Cell residual[PART / R][place.CELLS][C] = {};
    if (adds) {
#pragma unroll
        for (int n = 0; n < C; ++n) {
            const uint32_t channel = f.slots[c.slots[n]].channel;
#pragma unroll
            for (int i = 0; i < PART / R * place.CELLS; ++i) {
                // Threads and rows outside of the frame load cells of its border.
                const uint32_t row = min(y + i / place.CELLS * R, end - 1) / R;
                const uint32_t column = min(x + i % place.CELLS * place.APART, c.width - 1) / R;
                const size_t cell = (size_t)((int)row - f.residual_top) * f.residual_width + column + f.residual_margin;
                residual[i / place.CELLS][i % place.CELLS][n] = read_only<Cell>(f.residual + cell * f.channels + channel);
            }
        }
    }
    const uint32_t first = first_group<C>(c.base, left, c.last);
    fill_tile<T>(lines, c.base, first, c.top + top, end - 1);
    __syncthreads();
    if (x >= c.width) {
        return;
    }
    const Columns<C, R> columns(c.base, first, x, c.last);
    Vector<float, R * R> scale[C] = {};
#pragma unroll
    for (int n = 0; n < C && adds; ++n) {
        scale[n] = read_only<Vector<float, R * R>>(f.residual_std + f.slots[c.slots[n]].channel);
    }
    uint8_t *to = c.dst + (size_t)y * c.stride + x * C * sizeof(T);
#pragma unroll
    for (int row = 0; row < PART; ++row, to += c.stride) {
        if (y + row >= end) {
            return;
        }
#pragma unroll
        for (int i = 0; i < place.CELLS; ++i) {
            Vector<T, C * R> out;
#pragma unroll
            for (int k = 0; k < R; ++k) {
                const int channel = row % R * R + k;
                float sums[C];
#pragma unroll
                for (int n = 0; n < C; ++n) {
                    sums[n] = factor * scale[n].v[channel] * __half2float(residual[row / R][i][n].v[channel]);
                }
                columns.add(sums, lines + (place.row + row) * LINE, i, k);
#pragma unroll
                for (int n = 0; n < C; ++n) {
                    out.v[k * C + n] = encoded<T>(sums[n], c.base);
                }
            }
            // The padding of a row ends with a whole vector.
            if (x + i * place.APART < c.width) {
                *reinterpret_cast<Vector<T, C * R> *>(to + i * place.APART * C * sizeof(T)) = out;
            }
        }
    }
}

// Calls the function for the values of `tile` that the plan chooses.
#define FOR_TILE(function, tile)                                                                                       \
    switch (tile) {                                                                                                    \
    case 0: return function<uint8_t, 1, 2>(f, c, lines);                                                               \
    case 1: return function<uint8_t, 1, 4>(f, c, lines);                                                               \
    case 2: return function<uint8_t, 2, 2>(f, c, lines);                                                               \
    case 3: return function<uint16_t, 1, 2>(f, c, lines);                                                              \
    case 4: return function<uint16_t, 1, 4>(f, c, lines);                                                              \
    case 5: return function<uint16_t, 2, 2>(f, c, lines);                                                              \
    }

// Grid: (tiles of a row, tiles of a column, sources).
extern "C" __global__ void __launch_bounds__(TILE_THREADS) tadsr_unpack_tiles(const __grid_constant__ Frame f) {
    __shared__ __align__(16) float lines[TILE_ROWS * LINE];
    const Source &c = f.sources[blockIdx.z];
    FOR_TILE(unpack_tile, c.tile)
}

// Grid: (tiles of a row, tiles of a column, components).
extern "C" __global__ void __launch_bounds__(TILE_THREADS) tadsr_pack_tiles(const __grid_constant__ Frame f) {
    __shared__ __align__(16) float lines[TILE_ROWS * LINE];
    const Component &c = f.components[blockIdx.z];
    FOR_TILE(pack_tile, c.tile)
}

// ---- Planes to latent, residual to planes: the general case, a thread for each sample ----

// Returns the code of the resampled sample at (x, y).
__device__ float sample_at(const Samples &c, uint32_t x, uint32_t y) {
    const uint8_t *corner = c.src + (size_t)c.y_starts[y] * c.stride + (size_t)c.x_starts[x] * c.step + c.offset;
    const float *wx = c.x_weights + (size_t)x * c.x_taps, *wy = c.y_weights + (size_t)y * c.y_taps;
    float sum = 0.0f;
    for (uint32_t i = 0; i < c.x_taps; ++i, corner += c.step) {
        const uint8_t *at = corner;
        float column = 0.0f;
        for (uint32_t j = 0; j < c.y_taps; ++j, at += c.stride) {
            uint32_t word = c.bytes == 2 ? *reinterpret_cast<const uint16_t *>(at) : *at;
            column += wy[j] * (float)((word >> c.shift) & c.mask);
        }
        sum += wx[i] * column;
    }
    return sum;
}

// Block: (channels, cells of a row); grid: (blocks of a row, rows).
extern "C" __global__ void tadsr_unpack(const __grid_constant__ Frame f) {
    const uint32_t channel = threadIdx.x, x = blockIdx.x * blockDim.y + threadIdx.y, y = blockIdx.y;
    if (x >= f.latent_width) {
        return;
    }
    for (uint32_t i = 0; i < f.tiled_sources; ++i) {
        for (uint32_t s : f.sources[i].slots) {
            if (s != NO_SLOT && channel - f.slots[s].channel < f.slots[s].r * f.slots[s].r) {
                return;
            }
        }
    }
    float value = 0.0f;
    for (uint32_t s = 0; s < f.slot_count; ++s) {
        const Slot &slot = f.slots[s];
        const uint32_t k = channel - slot.channel;
        if (channel < slot.channel || k >= slot.r * slot.r) {
            continue;
        }
        const int sx = ((int)x - (int)f.margin) * (int)slot.r + (int)(k % slot.r);
        const int sy = ((int)y + f.latent_top) * (int)slot.r + (int)(k / slot.r);
        const uint32_t px = min(max(sx, 0), (int)slot.width - 1), py = min(max(sy, 0), (int)slot.height - 1);
        for (uint32_t i = f.tiled_sources; i < f.source_count; ++i) {
            if (f.sources[i].slots[0] == s) {
                value += f.sources[i].weight * sample_at(f.sources[i].samples, px, py);
            }
        }
        value = value * f.gain[channel] + f.bias[channel];
        break;
    }
    f.latent[((size_t)y * f.latent_width + x) * f.channels + channel] = __float2half_rn(value);
}

// Returns the residual of a plane of the latent at its sample (x, y).
__device__ float residual_at(const Frame &f, const Slot &slot, uint32_t x, uint32_t y) {
    const uint32_t channel = slot.channel + y % slot.r * slot.r + x % slot.r;
    const size_t row = (size_t)((int)(y / slot.r) - f.residual_top), column = x / slot.r + f.residual_margin;
    return f.residual_std[channel] * __half2float(f.residual[(row * f.residual_width + column) * f.channels + channel]);
}

// Block: samples of a row; grid: (blocks of a row, rows, components).
extern "C" __global__ void tadsr_pack(const __grid_constant__ Frame f) {
    const Component &c = f.components[f.tiled_components + blockIdx.z];
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x, y = c.top + blockIdx.y;
    if (column >= c.width || blockIdx.y >= c.rows) {
        return;
    }
    const uint32_t x = min(column, c.last);
    float value = sample_at(c.base, x, y);
    const float strength = *f.strength, factor = strength * c.scale;
    if (c.slots[0] != NO_SLOT && strength > 0.0f) {
        value += factor * residual_at(f, f.slots[c.slots[0]], x, y);
    }
    for (uint32_t which = 0; which < 2; ++which) {
        if (c.gains[which] == 0.0f || strength <= 0.0f) {
            continue;
        }
        float sum = 0.0f;
        for (uint32_t j = 0; j < f.y_taps; ++j) {
            for (uint32_t i = 0; i < f.x_taps; ++i) {
                sum += f.y_weights[y * f.y_taps + j] * f.x_weights[x * f.x_taps + i] *
                       residual_at(f, f.slots[1 + which], f.x_starts[x] + i, f.y_starts[y] + j);
            }
        }
        value += factor * c.gains[which] * sum;
    }
    uint8_t *pixel = c.dst + (size_t)y * c.stride + (size_t)column * c.base.step;
    if (c.base.bytes == 2) {
        *reinterpret_cast<uint16_t *>(pixel + c.base.offset) = encoded<uint16_t>(value, c.base);
    } else {
        pixel[c.base.offset] = encoded<uint8_t>(value, c.base);
    }
    if (f.filler != NO_FILLER && blockIdx.z == 0) {
        pixel[f.filler] = 255;
    }
}

// ---- Convolution ----

// A block computes ROWS x COLUMNS cells of N channels. Each warp computes a row: two tiles of 16
// cells by N / 8 tiles of 8 channels.
constexpr int ROWS = 8, COLUMNS = 32;
constexpr int THREADS = 32 * ROWS;
// Halves from one row of weights to the next in shared memory, and from one cell of 16 channels to
// the next. With 24 (12 words), the 32 lanes that load a fragment, 8 cells of 4 words, access 32
// different banks.
constexpr int STEP = 24;

__device__ uint32_t pair_at(const __half *p) { return *reinterpret_cast<const uint32_t *>(p); }

// CI input channels are loaded at once. A matrix product adds up 16 values: the 16 channels of a
// cell, or the four channels of four cells side by side, of which the fourth has the weight zero.
template <int N, int CI> __device__ void convolve(const Conv &p) {
    constexpr int PRODUCTS = CI == 16 ? 3 : 1, CELL = CI == 16 ? STEP : CI;
    constexpr int WIDTH = COLUMNS + (CI == 16 ? 2 : 4), PIECE = CI == 16 ? 8 : 4, PIECES = CI / PIECE;
    using Piece = Vector<__half, PIECE>;
    __shared__ __align__(16) __half cells[(ROWS + 2) * WIDTH * CELL];
    __shared__ __align__(16) __half weights[3 * PRODUCTS * N * STEP];
    const uint32_t out_width = p.in_width - 2, out_height = p.in_height - 2;
    const uint32_t left = blockIdx.x * COLUMNS, top = blockIdx.y * ROWS, first = blockIdx.z * N;
    const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / 4, pair = thread % 4 * 2;
    float sums[2][N / 8][4] = {};

    const uint32_t chunks = CI == 16 ? p.ci / CI : 1;
    for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
        __syncthreads();
        for (int i = thread; i < (ROWS + 2) * WIDTH * PIECES; i += THREADS) {
            const int cell = i / PIECES, part = i % PIECES * PIECE;
            const uint32_t x = left + cell % WIDTH, y = top + cell / WIDTH;
            Piece v = {};
            if (x < p.in_width && y < p.in_height) {
                v = read_only<Piece>(p.input + ((size_t)y * p.in_width + x) * p.ci + chunk * CI + part);
            }
            *reinterpret_cast<Piece *>(cells + cell * CELL + part) = v;
        }
        for (int i = thread; i < 3 * PRODUCTS * N * 2; i += THREADS) {
            const int row = i / 2, half = i % 2 * 8;
            const size_t at = (size_t)(chunk * 3 * PRODUCTS + row / N) * max(p.co, (uint32_t)N) + first + row % N;
            *reinterpret_cast<Vector<__half, 8> *>(weights + row * STEP + half) =
                read_only<Vector<__half, 8>>(p.weights + at * 16 + half);
        }
        __syncthreads();
#pragma unroll 1
        for (int ky = 0; ky < 3; ++ky) {
#pragma unroll
            for (int kx = 0; kx < PRODUCTS; ++kx) {
                uint32_t a[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const __half *at = cells + ((warp + ky) * WIDTH + 16 * m + kx + group) * CELL + pair;
                    a[m][0] = pair_at(at);
                    a[m][1] = pair_at(at + 8 * CELL);
                    a[m][2] = pair_at(at + 8);
                    a[m][3] = pair_at(at + 8 * CELL + 8);
                }
#pragma unroll
                for (int n = 0; n < N / 8; ++n) {
                    const __half *at = weights + ((PRODUCTS * ky + kx) * N + 8 * n + group) * STEP + pair;
                    const uint32_t b0 = pair_at(at), b1 = pair_at(at + 8);
                    mma<__half>(sums[0][n], a[0], b0, b1);
                    mma<__half>(sums[1][n], a[1], b0, b1);
                }
            }
        }
    }

    const uint32_t y = top + warp;
    if (y >= out_height) {
        return;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t x = left + 16 * m + 8 * h + group;
            if (x >= out_width) {
                continue;
            }
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const uint32_t channel = first + 8 * n + pair;
                if (N == 8 && channel >= p.co) {
                    continue;
                }
                const auto bias = read_only<Vector<float, 2>>(p.bias + channel);
                float v0 = sums[m][n][2 * h] + bias.v[0], v1 = sums[m][n][2 * h + 1] + bias.v[1];
                v0 = v0 > 0.0f ? v0 : v0 * p.slope;
                v1 = v1 > 0.0f ? v1 : v1 * p.slope;
                if (p.skip) {
                    const size_t at = ((size_t)y * p.skip_width + x) * p.co + channel;
                    const float2 skip = __half22float2(read_only<__half2>(p.skip + at));
                    v0 += skip.x;
                    v1 += skip.y;
                }
                __half *at = p.output + ((size_t)y * out_width + x) * p.co + channel;
                *reinterpret_cast<__half2 *>(at) = __floats2half2_rn(v0, v1);
            }
        }
    }
}

// Grid: (blocks of columns, blocks of rows, blocks of N channels).
#define CONV(name, n, ci)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Conv p) { convolve<n, ci>(p); }
CONV(tadsr_conv16, 16, 16)
CONV(tadsr_conv32, 32, 16)
CONV(tadsr_conv64, 64, 16)
// The latents of four channels: from one, and to one.
CONV(tadsr_conv16_of4, 16, 4)
CONV(tadsr_conv32_of4, 32, 4)
CONV(tadsr_conv8, 8, 16)
