"""What runs on CUDA alone: GEMMs of cuBLASLt with epilogues, and Triton kernels where torch has no single one."""
