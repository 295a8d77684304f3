"""What a backend is: its hooks, its kernels, the devices that they run on, and where they are found."""

# Makes its kinds of device known.
from kernelmux.contract import cuda as cuda
