"""What is compiled: functions in numba's Python, and the vector code in LLVM that they call. Imported to compile only."""
