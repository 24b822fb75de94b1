"""The command line: one file a command; each parses, calls and prints."""


def main() -> None:
    """Run `jlt COMMAND ...`."""
