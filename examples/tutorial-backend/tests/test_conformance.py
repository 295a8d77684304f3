"""The whole conformance suite, on every kernel of this backend: this one line is all there is to write."""

from kernelmux.conformance import suite

TestTutorial = suite("tutorial")
