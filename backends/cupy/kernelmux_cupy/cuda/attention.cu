// attention for decoding: each query row against its own sequence's cached keys and values, read through a block table.
// Any mixture of rows is right; each reads what it sees by itself, so that it is fast for few rows a sequence.
//
// Layout: q, y [m, heads, D]; the caches [pages, PAGE, kv_heads, D]. A row's `group` queries of one kv head share what
// is read, GROUP of them a block. What the row sees is cut into gridDim.z splits; `weigh` puts them together.
// Threads of `attend`: 128 a block, in teams of LANES. A team takes whole positions, a lane EACH pieces of 16 bytes of a
// key and of a value; UNROLL positions are on their way at once. Each team keeps its own maximum, sum of weights and
// weighted values, merged at the end. Threads of `weigh`: a column each, a block a query.
// Floor: the keys and values seen, once.
// Macros: Q, CACHE, Y, the formats' names; D; GROUP; PAGE; WHOLE, 1 where there is one split, whose result is final.

#include "order.cuh"
#include "rows.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int ITEMS = 16 / sizeof(CACHE);
constexpr int PIECES = D / ITEMS;
constexpr int LANES = PIECES > 16 ? 32 : PIECES > 8 ? 16 : PIECES > 4 ? 8 : 4;
constexpr int EACH = (PIECES + LANES - 1) / LANES;
constexpr int TEAMS = THREADS / LANES;
constexpr int UNROLL = (GROUP > 4 ? 2 : 4) / EACH;
constexpr int TILE = TEAMS * UNROLL;
// A multiprocessor's at once: told, for the compiler's own guess spills for D = 256.
constexpr int BLOCKS = GROUP > 4 ? 2 : 4;
// Of a maximum over nothing: finite, for -inf less -inf is no number.
constexpr float LOWEST = -3e38f;
constexpr float LOG2E = 1.4426950408889634f;

typedef Several<CACHE, ITEMS> Piece;

__device__ __forceinline__ Piece piece_at(const CACHE *from, bool there) {
    const uint4 raw = there ? *reinterpret_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const Piece *>(&raw);
}

struct Seen {
    int sequence, begin, end;
};

// A row's sequence and the range of positions that it sees; none where it is of no sequence.
__device__ __forceinline__ Seen seen(
    int row, const int *query_start, const int *kv_len, int sequences, int window) {
    __shared__ Seen found;
    if (threadIdx.x == 0) found = Seen{0, 0, 0};
    __syncthreads();
    for (int sequence = threadIdx.x; sequence < sequences; sequence += THREADS) {
        const int from = query_start[sequence], to = query_start[sequence + 1], length = kv_len[sequence];
        // One sequence at most has the row: no two threads write.
        if (from <= row && row < to) {
            const int end = max(length - (to - 1 - row), 0);
            found = Seen{sequence, window > 0 ? max(end - window, 0) : 0, end};
        }
    }
    __syncthreads();
    return found;
}

// What a team, or a split, found: of each query the largest score, the sum of weights, the weighted values.
struct Mixed {
    float peak[GROUP], total[GROUP], sums[GROUP][EACH][ITEMS];
};

__device__ __forceinline__ void add_lane(Mixed &mixed, int step) {
    UNROLLED(query, GROUP) {
        const float other = __shfl_xor_sync(WARP, mixed.peak[query], step);
        const float highest = fmaxf(mixed.peak[query], other);
        const float own = exp2f(mixed.peak[query] - highest), others = exp2f(other - highest);
        mixed.peak[query] = highest;
        mixed.total[query] = mixed.total[query] * own + __shfl_xor_sync(WARP, mixed.total[query], step) * others;
        UNROLLED(each, EACH)
            UNROLLED(i, ITEMS) {
                float &sum = mixed.sums[query][each][i];
                sum = sum * own + __shfl_xor_sync(WARP, sum, step) * others;
            }
    }
}

// One row's GROUP queries of one kv head (blockIdx.y) against one split of what the row sees.
// `found` holds y itself where WHOLE, else [m, heads, splits, D]; `weights` [m, heads, splits, 2]: peak and total.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(
    const Q *q, void *found, float *weights, const CACHE *k_cache, const CACHE *v_cache, const int *query_start,
    const int *kv_len, const int *block_table, int sequences, int width, float scale, float cap, int window, int heads,
    int kv_heads) {
    follow();
    // [query][piece of a lane][quarter of a piece][lane][4]: 16 bytes of neighbouring lanes are neighbours.
    __shared__ __align__(16) float queries[GROUP][EACH][ITEMS / 4][LANES][4];
    __shared__ float peaks[WARPS][GROUP], totals[WARPS][GROUP], sums[WARPS][GROUP][D];

    const int group = heads / kv_heads, tiles = (group + GROUP - 1) / GROUP;
    const int row = blockIdx.x, kv_head = blockIdx.y / tiles, member = blockIdx.y % tiles * GROUP;
    const int split = blockIdx.z, splits = gridDim.z;
    const long long first_head = (long long)row * heads + kv_head * group + member;
    const int lane = threadIdx.x % LANES, team = threadIdx.x / LANES;

    const Seen range = seen(row, query_start, kv_len, sequences, window);
    const int share = ((range.end - range.begin + splits - 1) / splits + TILE - 1) / TILE * TILE;
    const int first = range.begin + split * share, last = min(first + share, range.end);

    // Scores in powers of two; a capped one is still to be multiplied.
    const float factor = cap > 0.0f ? scale / cap : scale * LOG2E;
    for (int i = threadIdx.x; first < last && i < GROUP * EACH * ITEMS * LANES; i += THREADS) {
        const int query = i / (EACH * ITEMS * LANES), column = i % (EACH * ITEMS * LANES);
        const int piece = column / ITEMS, item = column % ITEMS;
        const bool there = column < D && member + query < group;
        queries[query][piece / LANES][item / 4][piece % LANES][item % 4] =
            there ? to_float(q[(first_head + query) * D + column]) * factor : 0.0f;
    }
    __syncthreads();

    Mixed mixed;
    UNROLLED(query, GROUP) {
        mixed.peak[query] = LOWEST;
        mixed.total[query] = 0.0f;
        UNROLLED(each, EACH)
            UNROLLED(i, ITEMS) mixed.sums[query][each][i] = 0.0f;
    }

    const int *pages = block_table + (long long)range.sequence * width;
    // The pages of the next tile are looked up while this one's keys are on their way.
    int page[UNROLL];
    UNROLLED(u, UNROLL) {
        const int position = first + u * TEAMS + team;
        page[u] = position < last ? pages[position / PAGE] : 0;
    }
    for (int start = first; start < last; start += TILE) {
        Piece keys[UNROLL][EACH], values[UNROLL][EACH];
        bool inside[UNROLL];
        UNROLLED(u, UNROLL) {
            const int position = start + u * TEAMS + team;
            inside[u] = position < last;
            const long long slot = (long long)page[u] * PAGE + position % PAGE;
            const long long at = (slot * kv_heads + kv_head) * D;
            UNROLLED(each, EACH) {
                const int piece = each * LANES + lane;
                // What lies beyond a sequence may be anything: it is never read.
                keys[u][each] = piece_at(k_cache + at + piece * ITEMS, inside[u] && piece < PIECES);
                values[u][each] = piece_at(v_cache + at + piece * ITEMS, inside[u] && piece < PIECES);
            }
            const int next = position + TILE;
            page[u] = next < last ? pages[next / PAGE] : 0;
        }

        float scores[GROUP][UNROLL];
        UNROLLED(query, GROUP)
            UNROLLED(u, UNROLL) scores[query][u] = 0.0f;
        UNROLLED(each, EACH)
            UNROLLED(quarter, ITEMS / 4) {
                float dense[UNROLL][4];
                UNROLLED(u, UNROLL)
                    UNROLLED(i, 4) dense[u][i] = to_float(keys[u][each].item[quarter * 4 + i]);
                UNROLLED(query, GROUP) {
                    float part[4];
                    read(&queries[query][each][quarter][lane][0], 0, part);
                    UNROLLED(u, UNROLL)
                        UNROLLED(i, 4) scores[query][u] += part[i] * dense[u][i];
                }
            }
        UNROLLED(query, GROUP)
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2)
                UNROLLED(u, UNROLL) scores[query][u] += __shfl_xor_sync(WARP, scores[query][u], step);

        UNROLLED(query, GROUP) {
            float highest = mixed.peak[query];
            UNROLLED(u, UNROLL) {
                float &score = scores[query][u];
                if (cap > 0.0f) score = cap * LOG2E * tanhf(score);
                if (inside[u]) highest = fmaxf(highest, score);
            }
            const float faded = exp2f(mixed.peak[query] - highest);
            mixed.peak[query] = highest;
            mixed.total[query] *= faded;
            UNROLLED(u, UNROLL) {
                scores[query][u] = inside[u] ? exp2f(scores[query][u] - highest) : 0.0f;
                mixed.total[query] += scores[query][u];
            }
            UNROLLED(each, EACH)
                UNROLLED(i, ITEMS) mixed.sums[query][each][i] *= faded;
        }
        UNROLLED(u, UNROLL)
            UNROLLED(each, EACH)
                UNROLLED(i, ITEMS) {
                    const float value = to_float(values[u][each].item[i]);
                    UNROLLED(query, GROUP)
                        mixed.sums[query][each][i] += scores[query][u] * value;
                }
    }

#pragma unroll
    for (int step = LANES; step < 32; step *= 2) add_lane(mixed, step);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 < LANES) {
        UNROLLED(query, GROUP) {
            if (lane == 0) {
                peaks[warp][query] = mixed.peak[query];
                totals[warp][query] = mixed.total[query];
            }
            UNROLLED(each, EACH) {
                const int piece = each * LANES + lane;
                if (piece < PIECES)
                    UNROLLED(i, ITEMS) sums[warp][query][piece * ITEMS + i] = mixed.sums[query][each][i];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * D; i += THREADS) {
        const int query = i / D, column = i % D;
        if (member + query >= group) break;
        float highest = LOWEST, total = 0.0f, sum = 0.0f;
        UNROLLED(w, WARPS) highest = fmaxf(highest, peaks[w][query]);
        UNROLLED(w, WARPS) {
            const float weight = exp2f(peaks[w][query] - highest);
            total += weight * totals[w][query];
            sum += weight * sums[w][query][column];
        }
        const long long head = first_head + query, at = head * splits + split;
        if (WHOLE) {
            // Where nothing is seen the result is zeros.
            put(static_cast<Y *>(found) + head * D + column, total == 0.0f ? 0.0f : sum / total);
        } else {
            if (first < last) static_cast<float *>(found)[at * D + column] = sum;
            if (column == 0) {
                weights[2 * at] = highest;
                weights[2 * at + 1] = total;
            }
        }
    }
}

constexpr int MOST_SPLITS = 64;

// One query's result from its splits; what those that saw nothing hold is not read.
extern "C" __global__ void weigh(const float *found, const float *weights, Y *y, int splits) {
    follow();
    __shared__ float shares[MOST_SPLITS];
    const long long at = (long long)blockIdx.x * splits;
    const int lane = threadIdx.x % 32;
    // Each warp for itself, two splits a lane: no warp waits for another but to read what the first wrote.
    float peak[2], weight[2], highest = LOWEST;
    UNROLLED(half, 2) {
        const int split = half * 32 + lane;
        weight[half] = split < splits ? weights[2 * (at + split) + 1] : 0.0f;
        peak[half] = weight[half] == 0.0f ? LOWEST : weights[2 * (at + split)];
        highest = fmaxf(highest, peak[half]);
    }
    highest = largest<32>(highest);
    float all = 0.0f;
    UNROLLED(half, 2) {
        const float share = exp2f(peak[half] - highest);
        all += share * weight[half];
        if (threadIdx.x < 32) shares[half * 32 + lane] = share;
    }
    all = total<32>(all);
    // Splits that saw something come first.
    int used = 0;
    UNROLLED(half, 2) used += __popc(__ballot_sync(WARP, weight[half] != 0.0f));
    __syncthreads();
    const int column = threadIdx.x;
    if (column >= D) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < used; ++split) sum += shares[split] * found[(at + split) * D + column];
    put(y + (long long)blockIdx.x * D + column, all == 0.0f ? 0.0f : sum / all);
}
