"""The whole conformance suite on this backend's kernels."""

from kernelmux.conformance import suite

TestNumba = suite("numba")
