"""The choice made by measuring: kernels timed in processes of their own, whole plans held against each other."""
