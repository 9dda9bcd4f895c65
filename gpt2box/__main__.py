"""`python -m gpt2box` is the command `gpt2box`."""

from gpt2box.cli import main

if __name__ == "__main__":
    main()
