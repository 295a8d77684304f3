// Products of quantised weights and q8_32 activations: mul_mat, mul_mat_add, qkv, gate_up_swiglu.
//
//   y[r][j] = sum over k of W[j][k] x[r][k], plus bias and residual; or silu(gate) * up of two such
//
// Layout: weights in tiles of 32 rows by BLOCKS x 32 columns (formats.cuh), tile (group, t) at group * tiles + t.
// Threads: a block takes sets of GROUPS groups of 32 rows (of a pair: a group of gate and the same of up), every
// gridDim.x-th one. Its WARPS warps take the tiles along k in turns, each through a ring of STAGES slots in shared
// memory of its own: the tiles' bytes as they are, and the rows' activations, which all lanes read together. The ring
// runs on into the next set, so that memory is busy while the warps' sums are added; that is done in the order of the
// warps, so that a result does not depend on who comes first.
// Floor: the file's bytes of the weights, each read once, at the speed of memory.
//
// Macros: PARTS matrices of formats FORMAT0.. written as OUT0.., names of formats, perhaps q8_32; GATED (two matrices,
// one output); RESIDUAL's format; BLOCKS, CHUNK (formats.cuh), WARPS, GROUPS, STAGES, SLOT bytes, ROWS of activations,
// RESIDENT blocks a multiprocessor. Shared memory: WARPS * (STAGES * SLOT + 128 * ROWS * LANES * KEEPS) bytes.
#include "formats.cuh"
#include "q8.cuh"
#include "warp.cuh"

// Rows of weights that a lane has.
const int LANES = GATED ? 2 : GROUPS;
// Places for the warps' sums.
const int KEEPS = LANES * ROWS > 2 ? 1 : 2;
const int COLUMNS = 32 * BLOCKS;
// A row of activations in a slot: integers, scales, sums.
const int STAGED = (40 * BLOCKS + 15) / 16 * 16;
const int UNIT = BLOCKS < 4 ? 4 * BLOCKS : 16;
const int UNITS = 40 * BLOCKS / UNIT;

struct Activations {
    const u8 *integers, *scales, *sums;
    int m, k;
};

struct Output {
    const float *bias;
    const RESIDUAL *residual;
    void *y;
    float *scales, *sums;
    int n;
};

// WIDTH bytes to shared memory, zeros unless `there`; not waited for.
template <int WIDTH>
__device__ __forceinline__ void copy_unit(u8 *to, const u8 *from, bool there = true) {
#if __CUDA_ARCH__ >= 800
    const u32 at = (u32)__cvta_generic_to_shared(to);
    if (WIDTH == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(WIDTH),
                     "r"(there ? WIDTH : 0));
#else
    if (WIDTH == 16) {
        *(uint4 *)to = there ? __ldg((const uint4 *)from) : make_uint4(0, 0, 0, 0);
        return;
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 4; ++i) ((u32 *)to)[i] = there ? ((const u32 *)from)[i] : 0u;
#endif
}

__device__ __forceinline__ void close_stage() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;");
#endif
}

// The oldest stage has arrived, for all lanes.
__device__ __forceinline__ void wait_stage() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
#endif
    __syncwarp();
}

template <int BYTES>
__device__ __forceinline__ void copy_tile(u8 *to, const u8 *from, int lane) {
#pragma unroll
    for (int i = 0; i < BYTES; i += 512)
        if (i + 512 <= BYTES || i + 16 * lane < BYTES) copy_unit<16>(to + i + 16 * lane, from + i + 16 * lane);
}

// Columns of tile t of all rows; beyond the last row zeros.
__device__ __forceinline__ void copy_rows(u8 *to, const Activations &x, int t, int lane) {
    const int blocks = x.k / 32;
#pragma unroll
    for (int i = 0; i < ROWS * UNITS; i += 32) {
        const int unit = i + lane, row = unit / UNITS, at = unit % UNITS * UNIT;
        if (i + 32 > ROWS * UNITS && unit >= ROWS * UNITS) break;
        const long long r = row < x.m ? row : 0;
        const u8 *from = x.integers + r * x.k + t * COLUMNS + at;
        if (at >= COLUMNS) from = x.scales + (r * blocks + t * BLOCKS) * 4 + at - COLUMNS;
        if (at >= COLUMNS + 4 * BLOCKS) from = x.sums + (r * blocks + t * BLOCKS) * 4 + at - COLUMNS - 4 * BLOCKS;
        copy_unit<UNIT>(to + row * STAGED + at, from, row < x.m);
    }
}

// Adds a slot's tiles, one or two, to the sums of this lane's rows.
template <class F, class G>
__device__ __forceinline__ void add_slot(float (&sums)[LANES][ROWS], const u8 *slot, int lane) {
    const u8 *rows = slot + 32 * (F::LANE + (LANES == 2 ? G::LANE : 0));
#pragma unroll 1
    for (int chunk = 0; chunk < BLOCKS; chunk += CHUNK) {
        Held<F> one;
        Held<G> two;
        one.read(slot, chunk, lane);
        if (LANES == 2) two.read(slot + 32 * F::LANE, chunk, lane);
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) {
            const u8 *at = rows + 32 * (chunk + c), *of = rows + COLUMNS + 4 * (chunk + c);
            int w[8], v[8];
            Scale s = scale_of(one, chunk, c), r = s;
#pragma unroll
            for (int i = 0; i < 8; ++i) w[i] = one.word(c, i);
            if (LANES == 2) {
                r = scale_of(two, chunk, c);
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] = two.word(c, i);
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const int4 low = *(const int4 *)(at + row * STAGED), high = *(const int4 *)(at + row * STAGED + 16);
                const float scale = *(const float *)(of + row * STAGED);
                float sum = 0.0f;
                if (F::MINIMUM || G::MINIMUM) sum = *(const float *)(of + row * STAGED + 4 * BLOCKS);
                sums[0][row] = add_block<F>(sums[0][row], w, s, low, high, scale, sum);
                if (LANES == 2) sums[LANES - 1][row] = add_block<G>(sums[LANES - 1][row], v, r, low, high, scale, sum);
            }
        }
    }
}

// Writes one row's 32 outputs of a group, one a lane; those from `n` on are not there.
template <class T>
struct Writer {
    static __device__ __forceinline__ void write(const Output &out, int row, int j, float y) {
        if (j < out.n) put((T *)out.y + (long long)row * out.n + j, y);
    }
};
template <>
struct Writer<q8_32> {
    static __device__ __forceinline__ void write(const Output &out, int row, int j, float y) {
        const float scale = q8_scale(largest<32>(fabsf(y))), q = q8_value(y, scale), sum = total<32>(q);
        if (j >= out.n) return;
        const long long block = (long long)row * (out.n / 32) + j / 32;
        ((signed char *)out.y)[block * 32 + j % 32] = (signed char)q;
        if (j % 32 == 0) {
            out.scales[block] = scale;
            out.sums[block] = scale * sum;
        }
    }
};

__device__ __forceinline__ float with_bias(const float *bias, int j, int n, float y) {
    return bias && j < n ? y + bias[j] : y;
}

// Adds the warps' sums of a set whose first group is `group`, and writes its outputs.
template <class T>
__device__ __forceinline__ void finish(
    const float *kept, const Output &out, const float *other_bias, int m, int group, int warp, int lane) {
    const int outputs = GATED ? ROWS : LANES * ROWS;
    for (int i = warp; i < outputs; i += WARPS) {
        const int row = i % ROWS, j = (group + i / ROWS) * 32 + lane;
        if (row >= m || j - lane >= out.n) continue;
        float y = 0.0f, z = 0.0f;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) {
            y += kept[(w * LANES * ROWS + i) * 32 + lane];
            if (GATED) z += kept[(w * LANES * ROWS + ROWS + row) * 32 + lane];
        }
        y = with_bias(out.bias, j, out.n, y);
        if (GATED) y = silu(y) * with_bias(other_bias, j, out.n, z);
        if (out.residual && j < out.n) y += to_float(out.residual[(long long)row * out.n + j]);
        Writer<T>::write(out, row, j, y);
    }
}

// Of many rows and several matrices each product gets registers for itself; together they spill.
#if PARTS > 1 && ROWS * PARTS >= 16 && !GATED
#define PRODUCT __noinline__
#else
#define PRODUCT __forceinline__
#endif

// This block's sets of one matrix, or of a pair: `first` and every gridDim.x-th after it, below `sets`.
template <class F, class G, class T>
__device__ PRODUCT void product(
    const u8 *weights, const u8 *others, const float *other_bias, const Output &out, const Activations &x, int first,
    int sets) {
    extern __shared__ __align__(16) u8 memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles = x.k / COLUMNS, turns = (tiles + WARPS - 1) / WARPS, last = (out.n + 31) / 32 - 1;
    const int units = first < sets ? ((sets - 1 - first) / (int)gridDim.x + 1) * turns : 0;
    u8 *ring = memory + warp * STAGES * SLOT;
    float *all = (float *)(memory + WARPS * STAGES * SLOT);

    const auto ask = [&](int unit) {
        const int group = (first + unit / turns * (int)gridDim.x) * GROUPS, t = warp + unit % turns * WARPS;
        if (unit < units && t < tiles) {
            u8 *slot = ring + unit % STAGES * SLOT;
            copy_rows(slot + 32 * (F::LANE + (LANES == 2 ? G::LANE : 0)), x, t, lane);
            copy_tile<32 * F::LANE>(slot, weights + ((long long)group * tiles + t) * (32 * F::LANE), lane);
            // Beyond the last group that one is read again, and not written.
            const long long other = GATED ? group : min(group + 1, last);
            if (LANES == 2)
                copy_tile<32 * G::LANE>(slot + 32 * F::LANE, others + (other * tiles + t) * (32 * G::LANE), lane);
        }
        close_stage();
    };

    float sums[LANES][ROWS] = {};
#pragma unroll
    for (int unit = 0; unit < STAGES; ++unit) ask(unit);
    for (int unit = 0; unit < units; ++unit) {
        wait_stage();
        if (warp + unit % turns * WARPS < tiles) add_slot<F, G>(sums, ring + unit % STAGES * SLOT, lane);
        __syncwarp();
        ask(unit + STAGES);
        if (unit % turns == turns - 1) {
            // Few sums have two places, so that those of the next set wait for nobody.
            float *kept = all + (KEEPS == 2 ? unit / turns % 2 * WARPS * LANES * ROWS * 32 : 0);
#pragma unroll
            for (int i = 0; i < LANES * ROWS; ++i) {
                kept[(warp * LANES * ROWS + i) * 32 + lane] = sums[i / ROWS][i % ROWS];
                sums[i / ROWS][i % ROWS] = 0.0f;
            }
            __syncthreads();
            finish<T>(kept, out, other_bias, x.m, (first + unit / turns * (int)gridDim.x) * GROUPS, warp, lane);
            if (KEEPS == 1) __syncthreads();
        }
    }
    if (PARTS > 1) __syncthreads();
}

#define PART(i)                                                                                            \
    const u8 *weights##i, const float *bias##i, const RESIDUAL *residual##i, void *y##i, float *scales##i, \
        float *sums##i, int n##i
// Of matrix i: its sets come after `before` others in the order that blocks take them; leaves the block's next one.
#define TAKE(i)                                                                                                     \
    {                                                                                                               \
        const int sets = (n##i + 32 * GROUPS - 1) / (32 * GROUPS);                                                  \
        const Output out = {bias##i, residual##i, y##i, scales##i, sums##i, n##i};                                  \
        product<FORMAT##i, FORMAT##i, OUT##i>(weights##i, weights##i, nullptr, out, x, next, sets);                 \
        next = next < sets ? (int)gridDim.x - 1 - (sets - 1 - next) % (int)gridDim.x : next - sets;                 \
    }

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) dp4a(
    PART(0),
#if PARTS > 1
    PART(1),
#endif
#if PARTS > 2
    PART(2),
#endif
    const u8 *integers, const u8 *scales, const u8 *sums, int m, int k) {
    const Activations x = {integers, scales, sums, m, k};
#if GATED
    const Output out = {bias0, residual0, y0, scales0, sums0, n0};
    product<FORMAT0, FORMAT1, OUT0>(weights0, weights1, bias1, out, x, blockIdx.x, (n0 + 31) / 32);
#else
    int next = blockIdx.x;
    TAKE(0)
#if PARTS > 1
    TAKE(1)
#endif
#if PARTS > 2
    TAKE(2)
#endif
#endif
}
