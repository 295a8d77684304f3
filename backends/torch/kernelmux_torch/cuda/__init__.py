"""What runs on CUDA alone: GEMMs of cuBLAS, and attention."""
