"""``python -m hansfree`` is the command ``hansfree``."""

from hansfree.cli import main

if __name__ == "__main__":
    main()
