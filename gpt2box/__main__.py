"""The command `gpt2box`, also as `python -m gpt2box`."""

import sys


def main() -> None:
    """As cli.main; a Ctrl-C while that is loaded is answered as a later one is."""
    try:
        from gpt2box.cli import main as command
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
