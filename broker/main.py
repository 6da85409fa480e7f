"""Running a broker in this process, with signals that end it."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from typing import TYPE_CHECKING

from zrpc.errors import ConfigError
from zrpc.keyring import INSECURE_KEYS, find_keyring
from zrpc.secret import find_secret, says_insecure
from zrpc.transport import descriptors
from zrpc.transport.credentials import Credentials
from zrpc_broker import defaults
from zrpc_broker.server import Broker

if TYPE_CHECKING:
    from types import FrameType

EXIT_USAGE = 2


def serve(
    bind: str = defaults.BIND,
    heartbeat_interval_s: float = defaults.HEARTBEAT_INTERVAL_S,
    missed_max: int = defaults.MISSED_MAX,
    verbose: bool = False,
    insecure: bool | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. Call it on the main thread."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="zrpc broker: %(message)s")
    logging.captureWarnings(True)
    warnings.formatwarning = _format_warning
    if heartbeat_interval_s <= 0 or missed_max < 1:
        print("zrpc broker: --heartbeat-interval must be above 0 and --missed 1 or more", file=sys.stderr)
        return EXIT_USAGE
    descriptors.make_room(defaults.FILES)  # as many of them as this host allows
    try:
        broker = Broker(bind, heartbeat_interval_s, missed_max, credentials=_credentials(insecure))
    except ConfigError as error:
        print(f"zrpc broker: {error}", file=sys.stderr)
        return EXIT_USAGE

    def stop(signum: int, frame: FrameType | None) -> None:
        broker.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"{defaults.READY_PREFIX}{broker.address}", flush=True)
    broker.run()
    return 0


def _credentials(insecure: bool | None) -> Credentials | None:
    """Whom it lets in; None, with a warning: anybody.

    Raises:
        ConfigError: what the environment names cannot be used.
    """
    keyring = find_keyring()
    if not (says_insecure() if insecure is None else insecure):
        return Credentials(find_secret(), keyring)
    if keyring is not None:
        raise ConfigError(INSECURE_KEYS)
    warnings.warn(
        "without authentication (insecure): whoever reaches this port can run code in the workers that meet here",
        stacklevel=2,
    )
    return None


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a line of the log: where in the source it arose says nothing to whoever starts a broker."""
    return str(message)
