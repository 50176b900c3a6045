"""`python -m sstf`: the same as the `sstf` command."""

from sstf.cli import main

if __name__ == "__main__":
    main()
