// A warp's ring of slots in shared memory: tiles of weights, and the activations beside them, copied behind its back by
// cp.async (compute capability 8.0; before that by loads and stores).
//
// Bulk copies (cp.async.bulk, 9.0), a tile an instruction, were tried and were no faster: docs/notes/dp4a.md.
// Macros: BLOCKS, STAGES, SLOT, ROWS.
#pragma once

#include "number.cuh"

const int COLUMNS = 32 * BLOCKS;
// A row of activations in a slot: integers, scales, sums. An odd number of 16 bytes: eight rows meet in no bank.
const int STAGED = ((40 * BLOCKS + 15) / 16 | 1) * 16;

struct Activations {
    const u8 *integers, *scales, *sums;
    int m, k;
};

// WIDTH bytes to shared memory; not waited for.
template <int WIDTH>
__device__ __forceinline__ void copy_unit(u8 *to, const u8 *from) {
#if __CUDA_ARCH__ >= 800
    const u32 at = (u32)__cvta_generic_to_shared(to);
    if (WIDTH == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(WIDTH));
#else
    UNROLLED(i, WIDTH / 4) ((u32 *)to)[i] = ((const u32 *)from)[i];
#endif
}

// A slot holds a unit of work: 0, 1, 2 and on, STAGES of them at a time. A unit's tiles and rows are asked for, then it
// is closed, also one that is not there, for closed ones are counted. All lanes call.
struct Ring {
    u8 *slots;
    int lane;

    __device__ __forceinline__ u8 *slot(int unit) const { return slots + unit % STAGES * SLOT; }

    template <int BYTES>
    __device__ __forceinline__ void ask_tile(u8 *to, const u8 *from) const {
#pragma unroll
        for (int i = 0; i < BYTES; i += 512)
            if (i + 512 <= BYTES || i + 16 * lane < BYTES) copy_unit<16>(to + i + 16 * lane, from + i + 16 * lane);
    }

    // Columns of tile t of all rows; beyond the last row that one again.
    __device__ __forceinline__ void ask_rows(u8 *to, const Activations &x, int t) const {
        const int UNIT = BLOCKS < 4 ? 4 * BLOCKS : 16, UNITS = 40 * BLOCKS / UNIT, blocks = x.k / 32;
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
    }

    __device__ __forceinline__ void close() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;");
#endif
    }

    // The oldest closed unit has arrived, for all lanes.
    __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
#endif
        __syncwarp();
    }
};
