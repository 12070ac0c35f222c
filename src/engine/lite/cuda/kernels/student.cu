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

// Samples of the input frame: layout, resampling and coding.
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
    // Bytes of a sample (1 or 2). Its value is (((word >> shift) & mask) - zero) / scale.
    uint32_t bytes, shift, mask;
    float scale, zero;
};

// A component in a plane of the latent, resampled to the size of the plane, and its weight.
struct Source {
    Samples samples;
    uint32_t slot;
    float weight;
};

// A component of the output frame: its base and its memory, which has the layout of the base except
// for the stride.
struct Component {
    Samples base;
    uint8_t *dst;
    uint32_t stride;
    // Samples in a row, and the rows that this band writes.
    uint32_t width, top, rows;
    // Plane of the latent that is added without resampling, and factors of the chroma planes, which
    // are added at the size of the frame.
    uint32_t slot;
    float gains[2];
    // Last sample of a row that is shown. Those after it repeat it: luma of YUY2 in odd widths.
    uint32_t last;
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
    // Whitening and scale of the residual for each channel. The strength is read when the kernel
    // runs, so one graph works for all values.
    const float *mean, *inverse_std, *residual_std, *strength;
    __half *latent;
    const __half *residual;
    // Cells in a row of the latent with both margins, and the row of its first cell in the frame.
    uint32_t latent_width;
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
    // Taps of the tables above.
    uint32_t x_taps, y_taps;
    // Byte of a pixel that is 255, or NO_FILLER.
    uint32_t filler, unused;
};

struct Conv {
    const __half *input;   // [in_height][in_width][ci]
    const __half *weights; // [ci / 16][9][co][16]
    const float *bias;     // [co]
    // Rows of skip_width cells of co channels from the first cell of the output on, or null.
    const __half *skip;
    __half *output;        // [in_height - 2][in_width - 2][co]
    uint32_t in_width, in_height, ci, co, skip_width;
    float slope;
};

static_assert(sizeof(Samples) == 80 && sizeof(Source) == 88 && sizeof(Component) == 120 && sizeof(Frame) == 1456 &&
                  sizeof(Conv) == 64,
              "sizes of params.rs");

// ---- Planes to latent, residual to planes ----

// Returns the resampled sample at (x, y).
__device__ float sample_at(const Samples &c, uint32_t x, uint32_t y) {
    const uint8_t *corner = c.src + (size_t)c.y_starts[y] * c.stride + (size_t)c.x_starts[x] * c.step + c.offset;
    const float *wx = c.x_weights + (size_t)x * c.x_taps, *wy = c.y_weights + (size_t)y * c.y_taps;
    float sum = 0.0f;
    for (uint32_t j = 0; j < c.y_taps; ++j) {
        const uint8_t *at = corner + (size_t)j * c.stride;
        float line = 0.0f;
        for (uint32_t i = 0; i < c.x_taps; ++i, at += c.step) {
            uint32_t word = c.bytes == 2 ? *reinterpret_cast<const uint16_t *>(at) : *at;
            line += wx[i] * (float)((word >> c.shift) & c.mask);
        }
        sum += wy[j] * line;
    }
    // The weights of an axis add up to 1, so the offset of the codes can be subtracted last.
    return (sum - c.zero) / c.scale;
}

// Block: (channels, cells of a row); grid: (blocks of a row, rows).
extern "C" __global__ void tadsr_unpack(const __grid_constant__ Frame f) {
    const uint32_t channel = threadIdx.x, x = blockIdx.x * blockDim.y + threadIdx.y, y = blockIdx.y;
    if (x >= f.latent_width) {
        return;
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
        for (uint32_t i = 0; i < f.source_count; ++i) {
            if (f.sources[i].slot == s) {
                value += f.sources[i].weight * sample_at(f.sources[i].samples, px, py);
            }
        }
        value = (value - f.mean[channel]) * f.inverse_std[channel];
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
    const Component &c = f.components[blockIdx.z];
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x, y = c.top + blockIdx.y;
    if (column >= c.width || blockIdx.y >= c.rows) {
        return;
    }
    const uint32_t x = min(column, c.last);
    float value = sample_at(c.base, x, y);
    const float strength = *f.strength;
    if (c.slot != NO_SLOT && strength > 0.0f) {
        value += strength * residual_at(f, f.slots[c.slot], x, y);
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
        value += strength * c.gains[which] * sum;
    }
    const float code = fminf(fmaxf(value * c.base.scale + c.base.zero, 0.0f), (float)c.base.mask);
    const uint32_t word = __float2uint_rn(code) << c.base.shift;
    uint8_t *pixel = c.dst + (size_t)y * c.stride + (size_t)column * c.base.step;
    if (c.base.bytes == 2) {
        *reinterpret_cast<uint16_t *>(pixel + c.base.offset) = (uint16_t)word;
    } else {
        pixel[c.base.offset] = (uint8_t)word;
    }
    if (f.filler != NO_FILLER && blockIdx.z == 0) {
        pixel[f.filler] = 255;
    }
}

// ---- Convolution ----

// A block computes ROWS x COLUMNS cells of N channels. Each warp computes a row: two tiles of 16
// cells by N / 8 tiles of 8 channels.
constexpr int ROWS = 8, COLUMNS = 32, WIDTH = COLUMNS + 2, CHUNK = 16;
// Halves from one cell to the next in shared memory. With 24 (12 words), the 32 lanes that load a
// fragment, 8 cells of 4 words, access 32 different banks.
constexpr int STEP = 24;
constexpr int THREADS = 32 * ROWS;

__device__ uint32_t pair_at(const __half *p) { return *reinterpret_cast<const uint32_t *>(p); }

template <int N> __device__ void convolve(const Conv &p) {
    __shared__ __align__(16) __half cells[(ROWS + 2) * WIDTH * STEP];
    __shared__ __align__(16) __half weights[9 * N * STEP];
    const uint32_t out_width = p.in_width - 2, out_height = p.in_height - 2;
    const uint32_t left = blockIdx.x * COLUMNS, top = blockIdx.y * ROWS, first = blockIdx.z * N;
    const int thread = threadIdx.x, warp = thread / 32, group = thread % 32 / 4, pair = thread % 4 * 2;
    float sums[2][N / 8][4] = {};

    for (uint32_t chunk = 0; chunk < p.ci / CHUNK; ++chunk) {
        __syncthreads();
        for (int i = thread; i < (ROWS + 2) * WIDTH * 2; i += THREADS) {
            const int cell = i / 2, half = i % 2 * 8;
            const uint32_t x = left + cell % WIDTH, y = top + cell / WIDTH;
            uint4 v = make_uint4(0, 0, 0, 0);
            if (x < p.in_width && y < p.in_height) {
                v = *reinterpret_cast<const uint4 *>(p.input + ((size_t)y * p.in_width + x) * p.ci + chunk * CHUNK + half);
            }
            *reinterpret_cast<uint4 *>(cells + cell * STEP + half) = v;
        }
        for (int i = thread; i < 9 * N * 2; i += THREADS) {
            const int row = i / 2, half = i % 2 * 8;
            const size_t at = ((size_t)(chunk * 9 + row / N) * p.co + first + row % N) * CHUNK + half;
            *reinterpret_cast<uint4 *>(weights + row * STEP + half) = *reinterpret_cast<const uint4 *>(p.weights + at);
        }
        __syncthreads();
#pragma unroll 1
        for (int ky = 0; ky < 3; ++ky) {
#pragma unroll
            for (int kx = 0; kx < 3; ++kx) {
                uint32_t a[2][4];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const __half *at = cells + ((warp + ky) * WIDTH + 16 * m + kx + group) * STEP + pair;
                    a[m][0] = pair_at(at);
                    a[m][1] = pair_at(at + 8 * STEP);
                    a[m][2] = pair_at(at + 8);
                    a[m][3] = pair_at(at + 8 * STEP + 8);
                }
#pragma unroll
                for (int n = 0; n < N / 8; ++n) {
                    const __half *at = weights + ((3 * ky + kx) * N + 8 * n + group) * STEP + pair;
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
                float v0 = sums[m][n][2 * h] + p.bias[channel], v1 = sums[m][n][2 * h + 1] + p.bias[channel + 1];
                v0 = v0 > 0.0f ? v0 : v0 * p.slope;
                v1 = v1 > 0.0f ? v1 : v1 * p.slope;
                if (p.skip) {
                    const size_t at = ((size_t)y * p.skip_width + x) * p.co + channel;
                    const float2 skip = __half22float2(*reinterpret_cast<const __half2 *>(p.skip + at));
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
extern "C" __global__ void __launch_bounds__(THREADS) tadsr_conv16(const __grid_constant__ Conv p) { convolve<16>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) tadsr_conv32(const __grid_constant__ Conv p) { convolve<32>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) tadsr_conv64(const __grid_constant__ Conv p) { convolve<64>(p); }
