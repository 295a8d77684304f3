// copy: rows of keys and values scattered into the paged cache, row i to slot slots[i]; a row of slot -1 is skipped.
//
// Layout: k, v [m, columns], rows k_row and v_row apart; the caches [slots, columns], for a page's rows follow one another. Threads: 256 a block, a
// row and WIDE neighbouring columns each. Floor: k and v once, in the cache's format once more.
// Macros: K, V, K_CACHE, V_CACHE, the formats' names; WIDE, 1 or 4.

#include "order.cuh"
#include "rows.cuh"

extern "C" __global__ void copy(
    const K *k, const V *v, const int *slots, K_CACHE *k_cache, V_CACHE *v_cache, int columns,
    int k_row, int v_row) {
    follow();
    const int column = WIDE * (blockIdx.y * blockDim.x + threadIdx.x);
    const long long slot = slots[blockIdx.x];
    if (slot < 0 || column >= columns) return;
    const long long row = blockIdx.x, target = slot * columns + column;
    float key[WIDE], value[WIDE];
    read(k, row * k_row + column, key);
    read(v, row * v_row + column, value);
    write(k_cache, target, key);
    write(v_cache, target, value);
}
