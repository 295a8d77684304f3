"""`python -m kernelmux`: the command, where a tool wants an interpreter to start."""

from kernelmux.cli import main

if __name__ == "__main__":
    main()
