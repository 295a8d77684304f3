// A slot's tiles times its rows by __dp4a: a lane has one row of each tile, and all rows of activations.
//
// All lanes read the same activations, and no sums go between them.
#pragma once

#include "formats.cuh"
#include "ring.cuh"

// What a lane holds of a tile: CHUNK blocks of its row from `chunk` on.
template <class F>
struct Held : Scales<F> {
    u32 integers[CHUNK * F::INTEGERS / 4];
    u32 upper[F::UPPER ? CHUNK * F::UPPER / 4 : 1];

    __device__ __forceinline__ void read(const u8 *tile, int chunk, int lane) {
        read_field<BLOCKS * F::INTEGERS, CHUNK * F::INTEGERS>(integers, tile, chunk * F::INTEGERS, lane);
        if constexpr (F::UPPER > 0)
            read_field<BLOCKS * F::UPPER, CHUNK * F::UPPER>(
                upper, tile + BLOCKS * F::INTEGERS * 32, chunk * F::UPPER, lane);
        this->read_scales(tile, chunk, lane);
    }

    // Word i of block c of the chunk.
    __device__ __forceinline__ int word(int c, int i) const {
        const u32 w = integers[F::BITS == 8 ? 8 * c + i : 4 * c + i % 4];
        const u32 up = F::BITS == 5 ? upper[c] : F::BITS == 6 ? upper[2 * c + i / 4] : 0;
        return i < 4 ? unpack<F, false>(w, up, i) : unpack<F, true>(w, up, i - 4);
    }
};

// `total` plus the product of a block: words of weights, words of activations, the activations' scale and sum.
template <class F>
__device__ __forceinline__ float add_block(float total, const int *w, Scale s, int4 low, int4 high, float scale, float sum) {
    int first = ZERO;
    first = __dp4a(w[0], low.x, first);
    first = __dp4a(w[1], low.y, first);
    first = __dp4a(w[2], low.z, first);
    first = __dp4a(w[3], low.w, first);
    int rest = F::SCALES == SIXTEENS ? ZERO : first;
    rest = __dp4a(w[4], high.x, rest);
    rest = __dp4a(w[5], high.y, rest);
    rest = __dp4a(w[6], high.z, rest);
    rest = __dp4a(w[7], high.w, rest);
    if constexpr (F::SCALES == SIXTEENS)
        return fmaf(scale, fmaf(s.m, sum_of(rest), s.d * sum_of(first)), total);
    total = fmaf(s.d, scale * sum_of(rest), total);
    return F::MINIMUM ? fmaf(-s.m, sum, total) : total;
}

// The sums of a set of TILES tiles of 32 rows.
template <int TILES>
struct Sums {
    float of[TILES][ROWS];

    __device__ __forceinline__ void clear() {
        UNROLLED(i, TILES * ROWS) of[i / ROWS][i % ROWS] = 0.0f;
    }

    template <class F, class G>
    __device__ __forceinline__ void add(const u8 *slot, const u8 *rows, int lane) {
#pragma unroll 1
        for (int chunk = 0; chunk < BLOCKS; chunk += CHUNK) {
            Held<F> one;
            Held<G> two;
            one.read(slot, chunk, lane);
            if (TILES == 2) two.read(slot + 32 * F::LANE, chunk, lane);
            UNROLLED(c, CHUNK) {
                const u8 *at = rows + 32 * (chunk + c), *scales = rows + COLUMNS + 4 * (chunk + c);
                int w[8], v[8];
                Scale s = scale_of<F>(one, chunk, c), r = s;
                UNROLLED(i, 8) w[i] = one.word(c, i);
                if (TILES == 2) {
                    r = scale_of<G>(two, chunk, c);
                    UNROLLED(i, 8) v[i] = two.word(c, i);
                }
                UNROLLED(row, ROWS) {
                    const int4 low = *(const int4 *)(at + row * STAGED), high = *(const int4 *)(at + row * STAGED + 16);
                    const float scale = *(const float *)(scales + row * STAGED);
                    float sum = 0.0f;
                    if (F::MINIMUM || G::MINIMUM) sum = *(const float *)(scales + row * STAGED + 4 * BLOCKS);
                    of[0][row] = add_block<F>(of[0][row], w, s, low, high, scale, sum);
                    if (TILES == 2) of[TILES - 1][row] = add_block<G>(of[TILES - 1][row], v, r, low, high, scale, sum);
                }
            }
        }
    }

    // To `kept` [TILES][ROWS][PITCH], 32 of each.
    template <int PITCH>
    __device__ __forceinline__ void keep(float *kept, int lane) const {
        UNROLLED(i, TILES * ROWS) kept[i * PITCH + lane] = of[i / ROWS][i % ROWS];
    }
};
