"""How a broker is set up where nobody says otherwise. Light: the command line imports it for every command."""

BIND = "tcp://127.0.0.1:5555"
HEARTBEAT_INTERVAL_S = 2.0
MISSED_MAX = 15
"""30 s of silence: so long may an import or a compiler hold the interpreter's lock. Death is noticed sooner."""
FILES = 16_384
"""A broker tries to be allowed this many open files: two for each worker."""
READY_PREFIX = "zrpc broker listens on "
"""A broker's first line of output begins with this; the address follows."""
