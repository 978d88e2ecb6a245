"""What the command `dinov3-nb` starts.

It stands outside the package, which sees by it that a command is running, and then leaves it to the command
to import what it needs: `dinov3-nb models` prints a table and has no use for PyTorch.
"""
import sys


def main() -> int:
    "The exit code of `dinov3_nb.cli.main`."
    from dinov3_nb.cli import main
    return main()


if __name__ == "__main__": sys.exit(main())
