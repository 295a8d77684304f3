// Kernels that overlap with the one before them in the stream (programmatic dependent launch, compute capability 9.0).
//
// launch.py launches every function of this package so: a block may start while the kernel before still runs. So each
// one calls `wait_for_inputs` before it reads or writes memory that another kernel writes or reads; only weights, which
// nobody writes, may be read earlier. A kernel that waits ends after all kernels before it have ended. On older cards,
// and behind a kernel of another library, blocks start when the kernel before has ended.
#pragma once

// All kernels before this one have ended, and what they wrote can be read, but not through the read-only cache.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may start as soon as all of this one's have called or ended, where there is room: early where
// no more blocks fit than have a place of their own, else late, or a few multiprocessors would get all of them.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// How kernels begin that have nothing to read earlier.
__device__ __forceinline__ void follow() {
    let_next_start();
    wait_for_inputs();
}
