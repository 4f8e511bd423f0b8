"""Messages to the terminal."""

import sys


def say(message: str) -> None:
    """Print a warning to standard error."""
    sys.stderr.write(f"warning: {message}\n")
