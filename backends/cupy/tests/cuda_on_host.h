// What CUDA C needs to run on the host: each thread of a block is a fiber, which runs until it waits for the others.
// Blocks run one after another. For tests of what a kernel computes; it says nothing of races or of speed.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Extents { int x, y, z; };
struct uint4 { unsigned int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
static Extents threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
template <class To, class From> To same_bits(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from), "as many bits");
    memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T __ldg(const T *at) { return *at; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincospif(float x, float *sine, float *cosine) {
    *sine = (float)sin(M_PI * (double)x);
    *cosine = (float)cos(M_PI * (double)x);
}
inline float half_to_float(unsigned short bits) { return (float)same_bits<_Float16>(bits); }
inline unsigned short float_to_half(float x) { return same_bits<unsigned short>((_Float16)x); }

// One for each thread of the block that runs.
struct Fiber {
    ucontext_t context;
    jmp_buf at;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool started, done;
    long shuffles, barriers;
};
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current;
static long arrived_at_barrier, arrivals;
static long arrived_in_warp[32];
static unsigned lanes[32][2][32];

// _setjmp and _longjmp, as swapcontext asks the kernel for the mask of signals each time.
inline void wait_until(const long &arrived, long wanted) {
    while (arrived < wanted) {
        if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
    }
}

inline void __syncthreads() {
    ++arrivals;
    ++arrived_at_barrier;
    wait_until(arrived_at_barrier, (long)fibers.size() * ++fibers[current].barriers);
}

// The 32 lanes' numbers. Two rounds of them are kept: nobody is more than one ahead.
inline const unsigned *exchange(unsigned mine) {
    Fiber &fiber = fibers[current];
    const int warp = current / 32;
    unsigned *slots = lanes[warp][fiber.shuffles++ % 2];
    slots[current % 32] = mine;
    ++arrivals;
    ++arrived_in_warp[warp];
    wait_until(arrived_in_warp[warp], 32 * fiber.shuffles);
    return slots;
}

template <class T> T __shfl_xor_sync(unsigned, T x, int step) {
    return same_bits<T>(exchange(same_bits<unsigned>(x))[current % 32 ^ step]);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    const unsigned *slots = exchange(mine);
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= slots[lane] << lane;
    return all;
}

static void (*body)(void **);
static void **arguments;

static void run_fiber() {
    body(arguments);
    fibers[current].done = true;
    ++arrivals;
    _longjmp(scheduler, 1);
}

// Until it waits or has ended.
static void resume(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

static void run_block() {
    arrived_at_barrier = 0;
    memset(arrived_in_warp, 0, sizeof(arrived_in_warp));
    for (Fiber &fiber : fibers) {
        fiber.started = fiber.done = false;
        fiber.shuffles = fiber.barriers = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_fiber, 0);
    }
    size_t left = fibers.size();
    while (left) {
        const long before = arrivals;
        for (current = 0; current < (int)fibers.size(); ++current) {
            if (fibers[current].done) continue;
            threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y};
            resume(fibers[current]);
            left -= fibers[current].done;
        }
        if (arrivals == before) {
            fprintf(stderr, "threads wait for others that have ended\n");
            abort();
        }
    }
}

template <auto kernel> struct Call;
template <class... P, void (*kernel)(P...)> struct Call<kernel> {
    static void with(void **args) { spread(args, std::index_sequence_for<P...>()); }
    template <size_t... I> static void spread(void **args, std::index_sequence<I...>) { kernel(*(P *)args[I]...); }
};

#define LAUNCH(kernel)                                                                                                \
    extern "C" void launch(const int *extents, void **args) {                                                         \
        gridDim = {extents[0], extents[1], extents[2]};                                                               \
        blockDim = {extents[3], extents[4], extents[5]};                                                              \
        fibers.resize(blockDim.x * blockDim.y * blockDim.z);                                                          \
        body = Call<kernel>::with;                                                                                    \
        arguments = args;                                                                                             \
        for (int z = 0; z < gridDim.z; ++z)                                                                           \
            for (int y = 0; y < gridDim.y; ++y)                                                                       \
                for (int x = 0; x < gridDim.x; ++x) {                                                                 \
                    blockIdx = {x, y, z};                                                                             \
                    run_block();                                                                                      \
                }                                                                                                     \
    }
