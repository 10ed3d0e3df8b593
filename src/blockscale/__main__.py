"""``python -m blockscale``: the command, with this Python."""

from blockscale.cli.main import run

if __name__ == "__main__":
    run()
