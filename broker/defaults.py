"""How a broker is set up where nobody says otherwise. Light: the command line imports it for every command."""

BIND = "tcp://127.0.0.1:5555"
HEARTBEAT_INTERVAL_S = 2.0
MISSED_MAX = 15
"""30 s of silence: so long may an import or a compiler hold the interpreter's lock. Death is noticed sooner."""
SETTLE_S = 1.0
"""So long a broker that was just started keeps newcomers to dynamic groups waiting: it may follow another one, whose
members come back first."""
REJOIN_WAIT_S = 15.0
"""So long a broker takes members for absent of which others have told: then they are lost. Workers notice the death of
a broker at once, and one that stands still (`sockets.HEARTBEAT_TIMEOUT_MS`) some seconds after each other. On a busy
host a try to come back takes up to 5 s (`zrpc.transport.brokers`, `broker_connection`): there is to be time for three.
"""
FILES = 16_384
"""A broker tries to be allowed this many open files: two for each worker."""
READY_PREFIX = "zrpc broker listens on "
"""A broker's first line of output begins with this; the address follows."""
