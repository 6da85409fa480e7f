"""What can go wrong, one class a cause. All are `ZrpcError`, which is a `RuntimeError`."""

from __future__ import annotations

from concurrent.futures import CancelledError


class ZrpcError(RuntimeError):
    """Root of the errors that zrpc itself raises."""


class NotInitializedError(ZrpcError):
    """A call before `init_rpc` or after `shutdown`."""


class AlreadyInitializedError(ZrpcError):
    """`init_rpc` while this process already is a worker."""


class ConfigError(ZrpcError, ValueError):
    """An option, environment variable or address that cannot be used; the message says which and what to write."""


class RendezvousError(ZrpcError):
    """The workers of the group did not find each other: store or broker unreachable, or somebody is missing."""


class RefusedError(ZrpcError):
    """The group refused this worker: its name or rank is taken, or its settings do not fit the others'."""


class UnknownWorkerError(ZrpcError):
    """No worker of that name or rank is in the group."""


class PeerLostError(ZrpcError):
    """The peer died, left or became unreachable while a call was under way.

    It is not known whether the call ran on the peer.
    """


class StaleWorkerError(UnknownWorkerError, PeerLostError):
    """A `WorkerInfo` of a worker that has left or died since; nothing was sent.

    Where a new worker has its name and rank, `get_worker_info` gives that one.
    """


class DrainingError(ZrpcError):
    """The callee takes no new calls, as it is about to end. The call did not run there, and may be made again.

    `wait_for_worker` has calls wait for the next worker of that name.
    """


class ConnectionLostError(ZrpcError):
    """The connection to the broker broke while a call that it was to relay was under way.

    It is not known whether the call ran on the peer, which may well live: it can be called again.
    """


class NotConnectedError(ConnectionLostError):
    """There is no connection to the broker now, and one is looked for. Nothing was sent."""


class RpcTimeoutError(ZrpcError):
    """The call's time ran out. It is not known whether the call ran, or still runs, on the peer."""


class CallCancelledError(ZrpcError, CancelledError):
    """The call was cancelled: its caller called `cancel` on its future, or a call that it was made for was cancelled.

    It is also a `concurrent.futures.CancelledError`. It is not known whether the call ran, or still runs, on the peer.
    """


class AgentClosedError(ZrpcError):
    """This worker shut down while the call was under way."""


class ProtocolError(ZrpcError):
    """A message that this version cannot read, or that is impossible in the state its subject is in."""


class SerializationError(ZrpcError):
    """An argument or a result that cannot be sent: it cannot be pickled, or its device is not mapped."""


class NotAllowedError(ZrpcError):
    """A worker refused something that a call or a value named: `allow` of its `RpcBackendOptions` does not cover it.

    The message says which worker refused what, and what to write there to allow it. Nothing of it was imported or run.
    """


class DeviceError(ZrpcError):
    """A tensor cannot be brought to a device or from it: no such device, no room on it, or it has failed."""


class RemoteError(ZrpcError):
    """A remote exception whose own class could not be made here.

    It is also of the nearest base class that could be, if that says more than `Exception`; else its message holds the
    remote traceback.
    """


class RRefError(ZrpcError):
    """An RRef used where it cannot be: its value asked for on a non-owner, or after its creation failed."""


class AutogradError(ZrpcError):
    """Distributed autograd used where it cannot be: no such context, or roots that cannot be differentiated."""


class LimitError(ZrpcError):
    """A limit of the system on this process is reached; the message says which one, and how to raise it."""


class OverloadedError(ZrpcError):
    """Too much waits: to be sent to a peer, or at the peer to be run. The call certainly did not run."""
