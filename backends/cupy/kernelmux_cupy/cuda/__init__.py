"""The CUDA C sources: `.cu` files are compiled by name, `.cuh` files are what they share."""
