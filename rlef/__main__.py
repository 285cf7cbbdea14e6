"""`python -m rlef` is `rlef`: what torchrun starts."""

from rlef.cli import main

if __name__ == "__main__":
    main(prog_name="rlef")
