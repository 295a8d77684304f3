"""What is compiled: functions in numba's Python, and vector code in LLVM that they call. Imported to compile only."""
