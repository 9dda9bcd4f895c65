"""The command `gpt2box`, also as `python -m gpt2box`."""

import os
import signal
import sys


def main() -> None:
    """As cli.main; a Ctrl-C while that is loaded is answered as a later one is."""
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # `command &` in a script ignores it
    try:
        if by_default:
            signal.signal(signal.SIGINT, end)
        from gpt2box.cli import main as command

        if by_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:  # in the moment before that, or after
        end()


def end(*_: object) -> None:
    """Not an exception: raised inside an import, some library's `except` would swallow it."""
    if sys.stderr:
        os.write(sys.stderr.fileno(), b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
