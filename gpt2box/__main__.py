"""The command `gpt2box`, also as `python -m gpt2box`."""

import os
import signal
import sys


def main() -> None:
    """As cli.main; a Ctrl-C while that is loaded is answered as a later one is."""
    open_streams()
    if os.getpid() == 1:  # the kernel ignores a signal for which the first process of a container has no handler
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # `command &` in a script ignores it
    try:
        if by_default:
            signal.signal(signal.SIGINT, end)
        from gpt2box.cli.main import main as command
        from gpt2box.utils.progress import open_text_stream

        sys.stderr = open_text_stream(2)
        if by_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:  # in the moment before that, or after
        end()


def open_streams() -> None:
    """Have all three: the number of one that is closed is the next file's, in which C++'s words would land."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "w" if descriptor else "r", closefd=False))


def end(*_: object) -> None:
    """Not an exception: raised inside an import, some library's `except` would swallow it."""
    try:
        os.write(sys.stderr.fileno(), b"interrupted\n")
    finally:  # the terminal may be gone
        os._exit(130)


if __name__ == "__main__":
    main()
