"""What runs on CUDA alone, or otherwise than on the CPU: GEMMs of cuBLAS, attention, copies, experts, tables."""
