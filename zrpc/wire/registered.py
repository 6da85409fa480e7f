"""The rule of `RpcBackendOptions(allow="registered")`: calls name what is exposed, and nothing is pickled.

What: `RegisteredRules` takes the place of the pickler (`codec`), with the values of `zrpc.wire.carried` and exceptions
as `zrpc.wire.plain_exceptions`, and of all other functions that resolve names (`zrpc.wire.loading`).

Invariants: nothing that comes is unpickled or imported, by callees and callers alike. What a call runs is an entry of
`zrpc.exposed.registry`, a public method of an exposed class, or an operator of torch that opens no files.

Threads: any; nothing changes after construction. Failure: `NotAllowedError` for what is not exposed or is pickled, on
either side; `SerializationError` on the sender for values of other types; `ProtocolError` for damaged ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from zrpc.errors import NotAllowedError, SerializationError
from zrpc.exception_text import repr_of, text_of
from zrpc.exposed import CALL, registry
from zrpc.wire import carried, pickling, plain_exceptions, values
from zrpc.wire.allowed_names import FILE_OPERATORS
from zrpc.wire.payload import Payload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zrpc.wire.envelope import Buffer


class RegisteredRules:
    """See `zrpc.wire.loading.Rules`.

    Args:
        worker: the name of this worker, for errors.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker

    # ---- in place of the pickler -----------------------------------------------------------------------------------

    def codec(self) -> pickling.Codec:
        """What takes the place of the functions of `zrpc.wire.pickling`."""
        return pickling.Codec(
            dumps=self.dumps,
            dumps_call=self.dumps_call,
            dumps_exception=self.dumps_exception,
            loads=self.loads_value,
            loads_call=self.loads_call,
            load_named_call=self.loads_call,
        )

    def dumps(self, obj: Any, *, whole: bool = False, keep_graph: bool = False, attachments: bool = True) -> Payload:
        """See `pickling.dumps`. Tensors of subclasses travel as plain tensors, with their gradients.

        Raises:
            SerializationError: something in it is not carried.
            NotAllowedError: a pickle stream is asked for.
        """
        del keep_graph, attachments
        if whole:
            raise self._refusal("to make a pickle stream")
        if type(obj) is torch.Tensor:
            return Payload(pickling.ONE_TENSOR, [obj])
        return Payload() if obj is None else self._pack(obj, obj, values.VALUES)

    def dumps_call(self, call: tuple[Any, tuple[Any, ...], Mapping[str, Any]], *, keep_graph: bool = False) -> Payload:
        """See `pickling.dumps_call`.

        Raises:
            NotAllowedError: the function is not exposed here.
        """
        del keep_graph
        function, args, kwargs = call
        name = registry.name_of(function)
        if name is None:
            raise self._refusal(f"to call {repr_of(function)}")
        return self._pack([*name, list(args), dict(kwargs)], (args, kwargs), pickling.CALL)

    def dumps_exception(self, error: BaseException, *, attachments: bool = True) -> Payload:
        """See `pickling.dumps_exception`."""
        del attachments
        return plain_exceptions.dump(error)

    def _pack(self, value: Any, shown: Any, prefix: bytes) -> Payload:
        try:
            return carried.pack(value, prefix)
        except values.UnpackableError as error:
            raise SerializationError(
                f"{repr_of(shown)} cannot be sent: {text_of(error)}. With allow='registered' values are made of "
                f"{carried.CARRIED}"
            ) from error

    def loads_value(self, payload: Payload) -> Any:
        """See `pickling.loads`: for what `dumps` made.

        Raises:
            NotAllowedError: it is a pickle, or names what is not exposed here.
            ProtocolError: it is damaged.
        """
        if len(payload.data) == 0:
            return None
        if payload.data == pickling.ONE_TENSOR and len(payload.tensors) == 1:
            return payload.tensors[0]
        return carried.unpack(payload, values.VALUES, self._refusal)

    def loads_call(self, payload: Payload) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """See `pickling.loads_call`: for what `dumps_call` made. Raises as `loads_value`."""
        module, name, args, kwargs = carried.unpack(payload, pickling.CALL, self._refusal)
        found = registry.find(module, name)
        if found is None:
            raise self._refusal(f"{module}.{name}")
        return found, tuple(args), kwargs

    # ---- names -----------------------------------------------------------------------------------------------------

    def loads(self, stream: Buffer) -> NoReturn:
        """See `loading.loads`."""
        del stream
        raise self._refusal("a pickled value")

    def load_from(self, file: Any) -> NoReturn:
        """See `loading.load_from`."""
        del file
        raise self._refusal("a pickled value")

    def find(self, module: str, name: str) -> NoReturn:
        """See `loading.find`."""
        raise self._refusal(f"{module}.{name}")

    def check(self, module: str, name: str) -> None:
        """See `loading.check`."""
        raise self._refusal(f"{module}.{name}")

    def check_module(self, module: Any) -> None:
        """See `loading.check_module`: one that an exposed class or function made may be run."""
        if not (registry.is_class(type(module)) or registry.is_method(type(module), CALL)):
            raise self._refusal(_described(type(module)))

    def check_operator(self, namespace: str, name: str) -> None:
        """See `loading.check_operator`: those of torch's own that open no files, and exposed ones."""
        if (namespace != "aten" or name in FILE_OPERATORS) and not registry.has_operator(f"{namespace}::{name}"):
            raise self._refusal(f"torch.ops.{namespace}.{name}")

    def method(self, value: Any, name: str) -> Any:
        """See `loading.method`: exposed methods alone."""
        if not registry.is_method(type(value), name):
            raise self._refusal(f"{_described(type(value))}.{name}")
        return getattr(value, name)

    def type_of(self, value: Any) -> carried.ValueType:
        """See `loading.type_of`."""
        return carried.ValueType(type(value))

    def _refusal(self, what: str) -> NotAllowedError:
        return NotAllowedError(
            f"{self._worker} refuses {what}: with allow='registered' (RpcBackendOptions, or ZRPC_ALLOW) of "
            f"{self._worker}, calls and values may name functions and classes marked with @zrpc.expose alone, through "
            "RRefs the public methods that such classes define, and nothing is unpickled. Put @zrpc.expose on what is "
            "to be called, in a module that this worker has imported, and give all workers of the group the same allow"
        )


def _described(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
