// Runs the threads of a block as fibers, and finds kernels by name.
#include "host.hpp"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <ucontext.h>

namespace student {
#include "../../../engine/lite/cuda/kernels/student.cu"
}

namespace layers {
#include "../kernels/layers.cu"
}

namespace candidates {
#include "../../../../benches/gpu/candidates.cu"
}

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    std::deque<std::vector<host::Copy>> copies;
    uint3 index;
    bool done;
};

// A barrier: the threads that have arrived, and the number of completed rounds.
struct Barrier {
    size_t arrived = 0, rounds = 0;
    void *values[32];
};

std::vector<Fiber> fibers;
std::vector<Barrier> warps;
Barrier block;
ucontext_t scheduler;
Fiber *running;
// Counts progress. A round without progress is a deadlock.
size_t events;
void (*kernel)(const void *);
const void *params;

void switch_to_scheduler() { swapcontext(&running->context, &scheduler); }

size_t number_of(const Fiber *fiber) { return fiber - fibers.data(); }

// Waits for `all` threads. The last one calls `then`.
template <typename F> void wait_at(Barrier &barrier, size_t all, F then) {
    const size_t round = barrier.rounds;
    ++events;
    if (++barrier.arrived == all) {
        then();
        barrier.arrived = 0;
        ++barrier.rounds;
        return;
    }
    while (barrier.rounds == round) {
        switch_to_scheduler();
    }
    ++events;
}

void run_thread() {
    kernel(params);
    running->done = true;
    ++events;
    switch_to_scheduler();
}

void run_block(bool backwards) {
    const size_t threads = fibers.size();
    block = {};
    warps.assign((threads + 31) / 32, {});
    for (size_t i = 0; i < threads; ++i) {
        Fiber &fiber = fibers[i];
        const unsigned n = i, x = blockDim.x, y = blockDim.y;
        fiber.index = {n % x, n / x % y, n / x / y};
        fiber.done = false;
        fiber.copies.assign(1, {});
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, run_thread, 0);
    }
    size_t left = threads;
    // Runs the threads of a warp until all wait for other warps or have ended.
    const auto run_warp = [&](size_t first) {
        const size_t lanes = std::min<size_t>(32, threads - first);
        for (size_t before = ~events; before != events;) {
            before = events;
            for (size_t i = 0; i < lanes; ++i) {
                running = &fibers[first + (backwards ? lanes - 1 - i : i)];
                if (!running->done) {
                    threadIdx = running->index;
                    swapcontext(&scheduler, &running->context);
                    left -= running->done;
                }
            }
        }
    };
    while (left > 0) {
        const size_t before = events;
        for (size_t i = 0; i < warps.size(); ++i) {
            run_warp(32 * (backwards ? warps.size() - 1 - i : i));
        }
        if (events == before) {
            std::fprintf(stderr, "%zu threads of a block wait at a barrier that the others do not reach\n", left);
            std::abort();
        }
    }
}

struct Entry {
    const char *name;
    void (*call)(const void *);
};

#define KERNEL(space, name, type) {#name, [](const void *p) { space::name(*(const space::type *)p); }}
#define LAYERS(type)                                                                                                   \
    KERNEL(layers, tadsr_conv16_##type, Conv), KERNEL(layers, tadsr_conv32_##type, Conv),                              \
        KERNEL(layers, tadsr_conv64_##type, Conv), KERNEL(layers, tadsr_wgrad16_##type, WeightGrad),                    \
        KERNEL(layers, tadsr_wgrad32_##type, WeightGrad), KERNEL(layers, tadsr_wgrad64_##type, WeightGrad),              \
        KERNEL(layers, tadsr_moments_##type, Norm), KERNEL(layers, tadsr_norm_##type, Norm),                           \
        KERNEL(layers, tadsr_attention16_##type, Attention), KERNEL(layers, tadsr_attention32_##type, Attention)

const Entry entries[] = {
    KERNEL(student, tadsr_unpack_tiles, Frame), KERNEL(student, tadsr_unpack, Frame),
    KERNEL(student, tadsr_conv8, Conv),         KERNEL(student, tadsr_conv16, Conv),
    KERNEL(student, tadsr_conv32, Conv),        KERNEL(student, tadsr_conv64, Conv),
    KERNEL(student, tadsr_conv16_of4, Conv),    KERNEL(student, tadsr_conv32_of4, Conv),
    KERNEL(student, tadsr_pack_tiles, Frame),   KERNEL(student, tadsr_pack, Frame),
    LAYERS(f16),                                LAYERS(bf16),
    KERNEL(candidates, direct, Layer),          KERNEL(candidates, row16, Layer),
    KERNEL(candidates, row32, Layer),           KERNEL(candidates, fused16, Layer),
    KERNEL(candidates, group64, Layer),
};

} // namespace

void __syncthreads() {
    wait_at(block, fibers.size(), [] {});
}

namespace host {

void together(void *value, void (*all)(void *const lanes[32])) {
    const size_t number = number_of(running);
    Barrier &warp = warps[number / 32];
    warp.values[number % 32] = value;
    wait_at(warp, 32, [&] { all(warp.values); });
}

std::deque<std::vector<Copy>> &copies() { return running->copies; }

} // namespace host

// Runs a kernel with the structure `params`. Returns false if there is no kernel of this name.
extern "C" bool tadsr_launch(const char *name, const uint32_t grid[3], const uint32_t block[3], const void *structure,
                             bool backwards) {
    static std::mutex one;
    const std::lock_guard<std::mutex> guard(one);
    for (const Entry &entry : entries) {
        if (std::strcmp(entry.name, name)) {
            continue;
        }
        kernel = entry.call;
        params = structure;
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block[0], block[1], block[2]};
        fibers = std::vector<Fiber>((size_t)block[0] * block[1] * block[2]);
        for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
            for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
                for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                    run_block(backwards);
                }
            }
        }
        return true;
    }
    return false;
}
