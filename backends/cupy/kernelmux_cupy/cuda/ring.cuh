// A warp's ring of slots in shared memory, filled behind its back: tiles of weights, and the activations beside them.
//
// From compute capability 9.0 on a slot is filled by bulk copies, a tile or a row's part each one instruction of one
// lane, and a barrier counts its bytes; from 8.0 on by cp.async of all lanes; before that by loads and stores.
// Macros: BLOCKS, STAGES, WARPS, SLOT, ROWS.
#pragma once

#include "number.cuh"

const int COLUMNS = 32 * BLOCKS;
// A row of activations in a slot: integers, scales, sums. An odd number of 16 bytes: eight rows meet in no bank.
const int STAGED = ((40 * BLOCKS + 15) / 16 | 1) * 16;

// Bulk copies are of multiples of 16 bytes.
#if __CUDA_ARCH__ >= 900 && BLOCKS % 4 == 0
#define BULK 1
#else
#define BULK 0
#endif

struct Activations {
    const u8 *integers, *scales, *sums;
    int m, k;
};

__device__ __forceinline__ u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

#if BULK
__device__ __forceinline__ void copy_bulk(u8 *to, const u8 *from, int bytes, u64 *barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
#else
// WIDTH bytes to shared memory; not waited for.
template <int WIDTH>
__device__ __forceinline__ void copy_unit(u8 *to, const u8 *from) {
#if __CUDA_ARCH__ >= 800
    const u32 at = shared_address(to);
    if (WIDTH == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(WIDTH));
#else
#pragma unroll
    for (int i = 0; i < WIDTH / 4; ++i) ((u32 *)to)[i] = ((const u32 *)from)[i];
#endif
}
#endif

// Slots are named by the unit of work that they hold: 0, 1, 2 and on, of which STAGES are asked for at a time. A unit is
// asked for in this order: `open`, its tiles, its rows, `close`; then it is waited for. All lanes call.
struct Ring {
    u8 *slots;
    u64 *barriers;
    int lane;

    __device__ __forceinline__ u8 *slot(int unit) const { return slots + unit % STAGES * SLOT; }

    __device__ __forceinline__ Ring(u8 *slots, u64 *barriers, int lane) : slots(slots), barriers(barriers), lane(lane) {
#if BULK
        if (lane < STAGES)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + lane)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
#endif
    }

    // So many bytes of weights, and a part of all rows, are to come; of a unit without work nothing.
    __device__ __forceinline__ void open(int unit, int weights) const {
#if BULK
        if (lane == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                             shared_address(barriers + unit % STAGES)),
                         "r"(weights ? weights + ROWS * 40 * BLOCKS : 0)
                         : "memory");
        __syncwarp();
#endif
    }

    template <int BYTES>
    __device__ __forceinline__ void ask_tile(int unit, int at, const u8 *from) const {
#if BULK
        if (lane == 0) copy_bulk(slot(unit) + at, from, BYTES, barriers + unit % STAGES);
#else
#pragma unroll
        for (int i = 0; i < BYTES; i += 512)
            if (i + 512 <= BYTES || i + 16 * lane < BYTES)
                copy_unit<16>(slot(unit) + at + i + 16 * lane, from + i + 16 * lane);
#endif
    }

    // Columns of tile t of all rows; beyond the last row that one again.
    __device__ __forceinline__ void ask_rows(int unit, int at, const Activations &x, int t) const {
        u8 *to = slot(unit) + at;
        const int blocks = x.k / 32;
#if BULK
#pragma unroll
        for (int i = 0; i < 3 * ROWS; i += 32) {
            const int row = (i + lane) / 3, part = (i + lane) % 3;
            if (row >= ROWS) break;
            const long long r = min(row, x.m - 1);
            const u8 *from = part == 0 ? x.integers + r * x.k + t * COLUMNS
                                       : (part == 1 ? x.scales : x.sums) + (r * blocks + t * BLOCKS) * 4;
            const int offset = part == 0 ? 0 : COLUMNS + (part - 1) * 4 * BLOCKS;
            copy_bulk(to + row * STAGED + offset, from, part == 0 ? COLUMNS : 4 * BLOCKS, barriers + unit % STAGES);
        }
#else
        const int UNIT = BLOCKS < 4 ? 4 * BLOCKS : 16, UNITS = 40 * BLOCKS / UNIT;
#pragma unroll
        for (int i = 0; i < ROWS * UNITS; i += 32) {
            const int piece = i + lane, row = piece / UNITS, offset = piece % UNITS * UNIT;
            if (i + 32 > ROWS * UNITS && piece >= ROWS * UNITS) break;
            const long long r = min(row, x.m - 1), block = r * blocks + t * BLOCKS;
            const u8 *from = x.integers + r * x.k + t * COLUMNS + offset;
            if (offset >= COLUMNS) from = x.scales + block * 4 + offset - COLUMNS;
            if (offset >= COLUMNS + 4 * BLOCKS) from = x.sums + block * 4 + offset - COLUMNS - 4 * BLOCKS;
            copy_unit<UNIT>(to + row * STAGED + offset, from);
        }
#endif
    }

    // Also of units that are not there: stages are counted.
    __device__ __forceinline__ void close() const {
#if __CUDA_ARCH__ >= 800 && !BULK
        asm volatile("cp.async.commit_group;");
#endif
    }

    // The unit has arrived, for all lanes; no more than STAGES - 1 younger ones are closed.
    __device__ __forceinline__ void wait(int unit) const {
#if BULK
        asm volatile(
            "{\n"
            ".reg .pred arrived;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], %1;\n"
            "@!arrived bra again;\n"
            "}" ::"r"(shared_address(barriers + unit % STAGES)),
            "r"(unit / STAGES & 1)
            : "memory");
#elif __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
#endif
        __syncwarp();
    }
};
