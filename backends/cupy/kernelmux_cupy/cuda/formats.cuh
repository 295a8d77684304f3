// Quantised weights as pack.py lays them out, and what lanes make of them.
//
// A tile is 32 rows by BLOCKS blocks of 32 columns, in one piece, of as many bytes as the file has for it. The tile's fields follow one another; each is [vectors][32 lanes][16 bytes], so that a warp reads 512 bytes
// that lie side by side, and no two lanes meet in a bank of shared memory. Fields: 4-bit (or 8-bit) integers, upper bits, scales, a superblock's scale of Q6_K.
//
// Of a block's 32 integers, word i (0 to 7) holds columns 4i to 4i + 3, as the activations' words do: the low nibbles of
// vector word i are word i, the high ones word i + 4. Formats without a minimum are stored in two's complement and
// unpacked to the top of a byte, so that dp4a sees q << SHIFT with its sign: scales are divided by that.
// Macros: BLOCKS of a tile, CHUNK blocks that a lane holds at once.
#pragma once
#include "number.cuh"

enum Scaling { ONE, TWO, SUPER, SIXTEENS };
// ONE: f16 d a block. TWO: f16 d, m a block. SUPER: f16 d, dmin and 12 bytes of 6-bit factors a superblock of 8 blocks.
// SIXTEENS: int8 factors for 16 columns each, and an f16 d a superblock.

template <int BITS_, bool SIGNED_, Scaling SCALES_>
struct Format {
    static const int BITS = BITS_;
    static const Scaling SCALES = SCALES_;
    static const bool MINIMUM = SCALES_ == TWO || SCALES_ == SUPER;
    static const int SHIFT = SIGNED_ ? 8 - BITS_ : 0;
    // Bytes a lane has of each field.
    static const int INTEGERS = BITS_ == 8 ? 32 : 16;  // a block
    static const int UPPER = BITS_ == 5 ? 4 : BITS_ == 6 ? 8 : 0;  // a block
    static const int SCALE = SCALES_ == ONE ? 2 * BLOCKS : SCALES_ == TWO ? 4 * BLOCKS : 16;
    static const int LAST = SCALES_ == SIXTEENS ? 2 : 0;
    static const int LANE = BLOCKS * (INTEGERS + UPPER) + SCALE + LAST;
};

typedef Format<4, true, ONE> Q4_0;
typedef Format<4, false, TWO> Q4_1;
typedef Format<5, true, ONE> Q5_0;
typedef Format<5, false, TWO> Q5_1;
typedef Format<8, true, ONE> Q8_0;
typedef Format<4, false, SUPER> Q4_K;
typedef Format<5, false, SUPER> Q5_K;
typedef Format<6, true, SIXTEENS> Q6_K;

__device__ __forceinline__ float half_low(u32 pair) { return to_float(f16{(u16)pair}); }
__device__ __forceinline__ float half_high(u32 pair) { return to_float(f16{(u16)(pair >> 16)}); }

// BYTES of this lane from byte `place` of a field in shared memory, of which a lane has WHOLE bytes.
template <int WHOLE, int BYTES>
__device__ __forceinline__ void read_field(u32 *to, const u8 *field, int place, int lane) {
    const int VECTOR = WHOLE < 16 ? WHOLE : 16, WIDTH = BYTES < VECTOR ? BYTES : VECTOR;
#pragma unroll
    for (int i = 0; i < BYTES; i += WIDTH) {
        const int p = place + i;
        const u8 *at = field + p / VECTOR * VECTOR * 32 + lane * VECTOR + p % VECTOR;
        if (WIDTH == 16) {
            const uint4 v = *(const uint4 *)at;
            to[i / 4] = v.x, to[i / 4 + 1] = v.y, to[i / 4 + 2] = v.z, to[i / 4 + 3] = v.w;
        } else if (WIDTH == 8) {
            const uint2 v = *(const uint2 *)at;
            to[i / 4] = v.x, to[i / 4 + 1] = v.y;
        } else if (WIDTH == 4)
            to[i / 4] = *(const u32 *)at;
        else
            to[i / 4] = *(const u16 *)at;
    }
}

// Word i (HIGH: 4 to 7, else 0 to 3, i counted from there) of a block, as four bytes: of the vector's word that holds
// it, and of the upper bits' word, of which Q6_K has one for each half.
template <class F, bool HIGH>
__device__ __forceinline__ int unpack(u32 w, u32 upper, int i) {
    if constexpr (F::BITS == 8) return (int)w;
    const int S = F::SHIFT;
    u32 bytes = (!HIGH ? w << S : S == 4 ? w : w >> (4 - S)) & 0x0f0f0f0fu << S;
    if constexpr (F::BITS == 5) {
        // One bit a byte: bit i of it, of the high half bit i + 4.
        const int up = S + 4 - i - (HIGH ? 4 : 0);
        bytes |= (up >= 0 ? upper << (up & 31) : upper >> (-up & 31)) & (0x10101010u << S);
    }
    if constexpr (F::BITS == 6) bytes |= (upper << (6 - 2 * i)) & 0xc0c0c0c0u;
    return (int)bytes;
}

// A row's scales for CHUNK blocks from `chunk` on, as they are stored.
template <class F>
struct Scales {
    static const int BYTES = F::SCALES == SUPER ? 16 : CHUNK * F::SCALE / BLOCKS;
    u32 scales[(BYTES + 3) / 4];
    u32 last;

    __device__ __forceinline__ void read_scales(const u8 *tile, int chunk, int row) {
        tile += BLOCKS * (F::INTEGERS + F::UPPER) * 32;
        read_field<F::SCALE, BYTES>(scales, tile, F::SCALES == SUPER ? 0 : chunk * F::SCALE / BLOCKS, row);
        if constexpr (F::LAST > 0) read_field<2, 2>(&last, tile + F::SCALE * 32, 0, row);
    }
};

// A block's scales as floats. With SIXTEENS `d` is for its first 16 columns and `m` for the others; else `m` is what
// the minimum takes off a column.
struct Scale { float d, m; };

// An integer below 2^23 as a float, without the converter, which is a slow unit.
__device__ __forceinline__ float small(u32 x) { return __uint_as_float(0x4b000000u | x) - 8388608.0f; }

template <class F>
__device__ __forceinline__ Scale scale_of(const Scales<F> &held, int chunk, int c) {
    const u32 *s = held.scales;
    const float unit = 1.0f / (1 << F::SHIFT);
    if constexpr (F::SCALES == ONE) return {(c % 2 ? half_high(s[c / 2]) : half_low(s[c / 2])) * unit, 0.0f};
    if constexpr (F::SCALES == TWO) return {half_low(s[c]), -half_high(s[c])};
    if constexpr (F::SCALES == SUPER) {
        // ggml's 12 bytes: 6 bits each for blocks 0 to 3; for 4 to 7 four bits, their upper two with the former's.
        const int at = 8 * ((chunk + c) % 4);
        u32 d = s[1] >> at & 63, m = s[2] >> at & 63;
        if (chunk + c >= 4) {
            d = (s[3] >> at & 15) | (s[1] >> (at + 6) & 3) << 4;
            m = (s[3] >> (at + 4) & 15) | (s[2] >> (at + 6) & 3) << 4;
        }
        return {half_low(s[0]) * small(d), half_high(s[0]) * small(m)};
    }
    if constexpr (F::SCALES == SIXTEENS) {
        const u32 pair = s[c / 2] >> (16 * (c % 2));
        const float d = half_low(held.last) * unit;
        return {d * (float)(signed char)pair, d * (float)(signed char)(pair >> 8)};
    }
}

// Sums of products start here, so that their bits are those of a float, 2^23 + 2^22 more than the sum: no conversion.
// Exact below 2^22, and 32 x 128 x 127 is less.
const int ZERO = 0x4b400000;
__device__ __forceinline__ float sum_of(int bits) { return __int_as_float(bits) - 12582912.0f; }
