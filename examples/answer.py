"""The shortest way from a model file to text: python examples/answer.py MODEL "The capital of France is"."""

import sys

import kernelmux

model = kernelmux.load(sys.argv[1])
for text in model.generate(sys.argv[2], max_tokens=32):
    print(text, end="", flush=True)
print()
