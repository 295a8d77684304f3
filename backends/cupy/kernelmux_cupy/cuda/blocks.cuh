// GGUF's blocks, one number at a time: each type's `number(block, i)`. All sizes are even, so that a block's 16-bit
// scales may be read as such.
#pragma once

#include "number.cuh"

__device__ __forceinline__ float half_at(const u8 *at) {
    return to_float(*reinterpret_cast<const f16 *>(at));
}

// Number i of 32 in 16 bytes: low halves first.
__device__ __forceinline__ int nibble(const u8 *from, int i) { return (from[i % 16] >> (i / 16 * 4)) & 15; }
__device__ __forceinline__ int bit(const u8 *from, int i) { return (from[i / 8] >> (i % 8)) & 1; }
// Number i of 256 in 128 bytes: 32 low halves, then the 32 high ones of the same bytes, and so on.
__device__ __forceinline__ int nibble_of_64(const u8 *from, int i) {
    return (from[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4)) & 15;
}
// Number i of 256 in 64 bytes: four times 32 in 32 bytes, the lowest bits first.
__device__ __forceinline__ int quarter(const u8 *from, int i) {
    return (from[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3;
}

struct Q4_0 {
    static constexpr int NUMBERS = 32, BYTES = 18;
    static __device__ float number(const u8 *block, int i) { return half_at(block) * (float)(nibble(block + 2, i) - 8); }
};

struct Q4_1 {
    static constexpr int NUMBERS = 32, BYTES = 20;
    static __device__ float number(const u8 *block, int i) {
        return half_at(block) * (float)nibble(block + 4, i) + half_at(block + 2);
    }
};

struct Q5_0 {
    static constexpr int NUMBERS = 32, BYTES = 22;
    static __device__ float number(const u8 *block, int i) {
        return half_at(block) * (float)((nibble(block + 6, i) | bit(block + 2, i) << 4) - 16);
    }
};

struct Q5_1 {
    static constexpr int NUMBERS = 32, BYTES = 24;
    static __device__ float number(const u8 *block, int i) {
        return half_at(block) * (float)(nibble(block + 8, i) | bit(block + 4, i) << 4) + half_at(block + 2);
    }
};

struct Q8_0 {
    static constexpr int NUMBERS = 32, BYTES = 34;
    static __device__ float number(const u8 *block, int i) { return half_at(block) * (float)(signed char)block[2 + i]; }
};

struct Q2_K {
    static constexpr int NUMBERS = 256, BYTES = 84;
    static __device__ float number(const u8 *block, int i) {
        const int scale = block[i / 16];
        const float d = half_at(block + 80) * (float)(scale & 15), least = half_at(block + 82) * (float)(scale >> 4);
        return d * (float)quarter(block + 16, i) - least;
    }
};

struct Q3_K {
    static constexpr int NUMBERS = 256, BYTES = 110;
    static __device__ float number(const u8 *block, int i) {
        const u8 *scales = block + 96;
        const int of = i / 16;
        const int low = (scales[of % 8] >> (of / 8 * 4)) & 15, high = (scales[8 + of % 4] >> (of / 4 * 2)) & 3;
        const float d = half_at(block + 108) * (float)((low | high << 4) - 32);
        // A set bit means that four need not be taken off.
        const int less = (block[i % 32] >> (i / 32)) & 1 ? 0 : 4;
        return d * (float)(quarter(block + 32, i) - less);
    }
};

// Scale and minimum of 6 bits each, eight of both in 12 bytes.
__device__ __forceinline__ float scaled_of_eight(const u8 *block, int of, int q) {
    const u8 *scales = block + 4;
    int scale, least;
    if (of < 4) {
        scale = scales[of] & 63;
        least = scales[4 + of] & 63;
    } else {
        scale = (scales[4 + of] & 15) | (scales[of - 4] >> 2 & 48);
        least = (scales[4 + of] >> 4) | (scales[of] >> 2 & 48);
    }
    return half_at(block) * (float)scale * (float)q - half_at(block + 2) * (float)least;
}

struct Q4_K {
    static constexpr int NUMBERS = 256, BYTES = 144;
    static __device__ float number(const u8 *block, int i) {
        return scaled_of_eight(block, i / 32, nibble_of_64(block + 16, i));
    }
};

struct Q5_K {
    static constexpr int NUMBERS = 256, BYTES = 176;
    static __device__ float number(const u8 *block, int i) {
        const int high = (block[16 + i % 32] >> (i / 32)) & 1;
        return scaled_of_eight(block, i / 32, nibble_of_64(block + 48, i) | high << 4);
    }
};

struct Q6_K {
    static constexpr int NUMBERS = 256, BYTES = 210;
    static __device__ float number(const u8 *block, int i) {
        const int low = (block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4)) & 15, high = quarter(block + 128, i);
        const float d = half_at(block + 208) * (float)(signed char)block[192 + i / 16];
        return d * (float)((low | high << 4) - 32);
    }
};
