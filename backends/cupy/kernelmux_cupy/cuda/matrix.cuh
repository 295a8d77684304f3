// A slot's tiles times its rows by the matrix unit (mma.sync of int8, compute capability 8.0): for many rows.
//
// The tiles lie as the unit wants them: of a row's vector of 16 bytes lane q of four takes word q, whose low nibbles are
// columns 4q to 4q + 3 of a block and the high ones columns 16 + 4q on, as two words of the unit's left operand are.
// A lane has rows g, g + 8, g + 16, g + 24 of a tile (g = lane / 4), and of eight activations numbers 2q and 2q + 1.
#pragma once

#include "formats.cuh"
#include "ring.cuh"
#include "warp.cuh"

// Groups of eight rows of activations; those beyond ROWS are the last one again, and not kept.
const int EIGHTS = (ROWS + 7) / 8;

// a b and ZERO for 16 rows of a (g and g + 8), 8 columns of b; 32 products deep, or 16: the first halves, or the others.
__device__ __forceinline__ void multiply(int (&d)[4], const int (&a)[4], int low, int high) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high), "r"(ZERO));
}
__device__ __forceinline__ void multiply(int (&d)[4], int first, int second, int b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(first), "r"(second), "r"(b), "r"(ZERO));
}

// CHUNK blocks of activations: of each eight rows the scales and sums of this lane's two.
struct Factors {
    float scale[EIGHTS][2][CHUNK], sum[EIGHTS][2][CHUNK];

    __device__ __forceinline__ void read(const u8 *rows, int chunk, int lane) {
        UNROLLED(i, 2 * EIGHTS) {
            const int row = min(i / 2 * 8 + lane % 4 * 2 + i % 2, ROWS - 1);
            const Several *at = (const Several *)(rows + row * STAGED + COLUMNS + 4 * chunk);
            *(Several *)scale[i / 2][i % 2] = *at;
            *(Several *)sum[i / 2][i % 2] = at[BLOCKS / CHUNK];
        }
    }

    struct alignas(CHUNK < 4 ? 4 * CHUNK : 16) Several { float item[CHUNK]; };
};

// Words q and q + 4 of a row's block.
template <class F>
__device__ __forceinline__ void read_words(int &low, int &high, const u8 *tile, int block, int row, int q) {
    u32 w, v, up = 0, upper = 0;
    const int WHOLE = BLOCKS * F::INTEGERS;
    read_field<WHOLE, 4>(&w, tile, block * F::INTEGERS + 4 * q, row);
    v = w;
    if constexpr (F::BITS == 8) read_field<WHOLE, 4>(&v, tile, block * F::INTEGERS + 16 + 4 * q, row);
    if constexpr (F::UPPER > 0) {
        read_field<BLOCKS * F::UPPER, 4>(&up, tile + WHOLE * 32, block * F::UPPER, row);
        upper = up;
        if constexpr (F::UPPER == 8) read_field<BLOCKS * 8, 4>(&upper, tile + WHOLE * 32, block * 8 + 4, row);
    }
    low = unpack<F, false>(w, up, q);
    high = unpack<F, true>(v, upper, q);
}

// The sums of a set of TILES tiles of 32 rows.
template <int TILES>
struct Sums {
    float of[TILES][4][2 * EIGHTS];

    __device__ __forceinline__ void clear() {
        UNROLLED(i, TILES * 8 * EIGHTS) of[i / (8 * EIGHTS)][i / (2 * EIGHTS) % 4][i % (2 * EIGHTS)] = 0.0f;
    }

    template <class F, class G>
    __device__ __forceinline__ void add(const u8 *slot, const u8 *rows, int lane) {
        const int own = lane / 4 + 8 * (lane % 4);
#pragma unroll 1
        for (int chunk = 0; chunk < BLOCKS; chunk += CHUNK) {
            Factors x;
            Scales<F> one;
            Scales<G> two;
            x.read(rows, chunk, lane);
            one.read_scales(slot, chunk, own);
            if (TILES == 2) two.read_scales(slot + 32 * F::LANE, chunk, own);
            UNROLLED(c, CHUNK) {
                int low[EIGHTS], high[EIGHTS];
                UNROLLED(e, EIGHTS) {
                    const int row = min(8 * e + lane / 4, ROWS - 1);
                    const int *at = (const int *)(rows + row * STAGED + 32 * (chunk + c)) + lane % 4;
                    low[e] = at[0];
                    high[e] = at[4];
                }
                add_block<F>(of[0], slot, chunk, c, scale_of<F>(one, chunk, c), low, high, x, lane);
                if (TILES == 2)
                    add_block<G>(
                        of[TILES - 1], slot + 32 * F::LANE, chunk, c, scale_of<G>(two, chunk, c), low, high, x, lane);
            }
        }
    }

    // To `kept` [TILES][ROWS][PITCH], 32 of each.
    template <int PITCH>
    __device__ __forceinline__ void keep(float *kept, int lane) const {
        UNROLLED(t, TILES)
            UNROLLED(i, 2 * EIGHTS) {
                const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
                UNROLLED(j, 4)
                    if (row < ROWS) kept[(t * ROWS + row) * PITCH + lane / 4 + 8 * j] = of[t][j][i];
            }
    }

private:
    // Block c of a tile's chunk; `own` are the scales of row g + 8q, `low` and `high` this lane's words of the activations.
    template <class F>
    __device__ __forceinline__ void add_block(
        float (&to)[4][2 * EIGHTS], const u8 *tile, int chunk, int c, Scale own, const int (&low)[EIGHTS],
        const int (&high)[EIGHTS], const Factors &x, int lane) {
        UNROLLED(half, 2) {
            int a[4];
            read_words<F>(a[0], a[2], tile, chunk + c, lane / 4 + 16 * half, lane % 4);
            read_words<F>(a[1], a[3], tile, chunk + c, lane / 4 + 16 * half + 8, lane % 4);
            const float d[2] = {__shfl_sync(WARP, own.d, 2 * half, 4), __shfl_sync(WARP, own.d, 2 * half + 1, 4)};
            float m[2] = {};
            if (F::MINIMUM || F::SCALES == SIXTEENS) {
                m[0] = __shfl_sync(WARP, own.m, 2 * half, 4);
                m[1] = __shfl_sync(WARP, own.m, 2 * half + 1, 4);
            }
            UNROLLED(e, EIGHTS) {
                int first[4], rest[4];
                if constexpr (F::SCALES == SIXTEENS) {
                    multiply(first, a[0], a[1], low[e]);
                    multiply(rest, a[2], a[3], high[e]);
                } else
                    multiply(first, a, low[e], high[e]);
                UNROLLED(i, 4) {
                    float &sum = to[2 * half + i / 2][2 * e + i % 2];
                    const float scale = x.scale[e][i % 2][c];
                    if constexpr (F::SCALES == SIXTEENS)
                        sum = fmaf(scale, fmaf(m[i / 2], sum_of(rest[i]), d[i / 2] * sum_of(first[i])), sum);
                    else
                        sum = fmaf(d[i / 2], scale * sum_of(first[i]), sum);
                    if (F::MINIMUM) sum = fmaf(-m[i / 2], x.sum[e][i % 2][c], sum);
                }
            }
        }
    }
};
