"""The command `gpt2box`, also as `python -m gpt2box`."""

import os
import signal
import sys


def main() -> None:
    """Run the command line, and exit cleanly on Ctrl-C even while the modules are still loading."""
    open_streams()
    if os.getpid() == 1:  # for process 1 of a container the kernel ignores signals without a handler
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
    except KeyboardInterrupt:  # raised before `end` was installed, or after it was removed
        end()


def open_streams() -> None:
    """Open /dev/null for each standard stream that is closed.

    Otherwise the next opened file would get its descriptor, and libraries in C++ would write messages into that file.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: the closed stream's
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "w" if descriptor else "r", closefd=False))


def end(*_: object) -> None:
    """Exit with code 130. Raises no exception: an `except` around a library's import could swallow it."""
    try:
        os.write(sys.stderr.fileno(), b"interrupted\n")
    finally:  # the write fails if the terminal was closed
        os._exit(130)


if __name__ == "__main__":
    main()
