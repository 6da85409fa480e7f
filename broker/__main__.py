"""`python -m zrpc_broker`: the same as `zrpc broker`, without the command line's own dependencies."""

from __future__ import annotations

import argparse
import sys

from zrpc_broker import defaults
from zrpc_broker.main import serve


def main() -> int:
    """Parse the arguments and serve; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m zrpc_broker",
        description="Relay messages between zrpc workers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--bind", default=defaults.BIND, help="where to listen; port 0: any free one")
    parser.add_argument("--heartbeat-interval", type=float, default=defaults.HEARTBEAT_INTERVAL_S, metavar="SECONDS")
    parser.add_argument("--missed", type=int, default=defaults.MISSED_MAX, help="silent intervals before it is lost")
    parser.add_argument("--verbose", action="store_true", help="log who comes and goes")
    parser.add_argument("--insecure", action="store_true", help="let anybody in who reaches the port")
    args = parser.parse_args()
    return serve(args.bind, args.heartbeat_interval, args.missed, args.verbose, args.insecure or None)


if __name__ == "__main__":
    sys.exit(main())
