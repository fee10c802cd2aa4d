"""``python -m dkl``: the command line, also for launchers that start modules."""

from dkl.cli import main

if __name__ == "__main__":
    main()
