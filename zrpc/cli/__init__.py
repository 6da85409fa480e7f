"""The command line: `zrpc broker`, `zrpc launch`, and the launch scripts."""

from zrpc.cli.main import main

__all__ = ["main"]
