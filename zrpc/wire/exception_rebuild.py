"""Makes exceptions again that `zrpc.wire.exception_state` took apart; see there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from zrpc.errors import RemoteError
from zrpc.exception_text import is_interrupt, set_cause, set_context, set_suppresses_context, text_of
from zrpc.wire import loading, reducers
from zrpc.wire.exception_fields import ExceptionState, Part, Unsent, dict_of, new, slots_of
from zrpc.wire.stand_in import stand_in

if TYPE_CHECKING:
    from collections.abc import Callable


def make(state: tuple[Any, ...]) -> BaseException:
    """The exception that `state` tells of; of another class if it cannot be made of its own."""
    return _Making(ExceptionState(*state)).make()


class _Making:
    """Makes one exception again."""

    def __init__(self, state: ExceptionState) -> None:
        self._state = state
        self._is_whole = state.is_whole
        self._received = reducers.received_exceptions()

    def make(self) -> BaseException:
        """It, or what stands for it."""
        state = self._state
        classes = [_import(*name) for name in state.classes]
        if state.has_own_class and classes[0] is not None:
            error = self._of_its_class(classes[0])
            if error is not None:
                return error
        for cls in classes:
            if cls is not None and issubclass(cls, Exception):
                error = self._try(self._of_stand_in, cls)
                if error is not None:
                    return error
        return self._known(RemoteError(f"{state.name}: {state.text}" if state.text else state.name))

    def _of_its_class(self, cls: type[BaseException]) -> BaseException | None:
        error = self._try(self._as_its_class_says)
        if error is None:
            error = self._try(self._of, cls)
            if error is not None and not self._is_whole and text_of(error) != self._state.text:
                return self._try(self._become_stand_in, error)  # it needs what it lacks
        return error

    def _become_stand_in(self, error: BaseException) -> BaseException:
        """Give `error` its text by another class. So its destructor does not run, which may need what it lacks."""
        object.__setattr__(error, "__class__", stand_in(type(error), self._state.name, self._state.text))
        return error

    def _try(self, how: Callable[..., BaseException | None], *args: Any) -> BaseException | None:
        try:
            return how(*args)
        except BaseException as failure:
            if is_interrupt(failure):
                raise
            return None

    def _known(self, error: BaseException) -> BaseException:
        self._received.made[self._state.number] = error
        return error

    def _as_its_class_says(self) -> BaseException | None:
        if self._state.reduced is None:
            return None
        made, state = self._state.reduced
        function, args = reducers.load_part(made)
        error = function(*args)
        if not isinstance(error, BaseException):
            return None
        self._known(error)
        if state is not None:
            _set_state(error, reducers.load_part(state))
        self._link(error)
        return error

    def _of_stand_in(self, cls: type[BaseException]) -> BaseException:
        return self._of(stand_in(cls, self._state.name, self._state.text))

    def _of(self, cls: type[BaseException]) -> BaseException:
        args = [self._load(part, Unsent("<lost>")) for part in self._state.args]
        error = self._known(new(cls, tuple(args)))
        attributes = dict_of(error)
        for name, part in self._state.attributes.items():
            self._set(part, partial(attributes.__setitem__, name))
        slots = slots_of(cls)
        for name, part in self._state.slots.items():
            if name in slots:
                self._set(part, partial(slots[name].__set__, error))
        self._link(error)
        return error

    def _link(self, error: BaseException) -> None:
        for name, number in self._state.links.items():
            self._received.links.append((partial(set_cause if name == "cause" else set_context, error), number))
        set_suppresses_context(error, self._state.suppresses_context)

    def _load(self, part: Part, otherwise: object) -> Any:
        loaded = [otherwise]
        self._set(part, partial(loaded.__setitem__, 0))
        return loaded[0]

    def _set(self, part: Part, set_value: Callable[[Any], object]) -> None:
        """Give the value of `part` to `set_value`; go on without it where that raises."""
        is_stream, value = part
        try:
            set_value(reducers.load_part(value) if is_stream else value)
        except BaseException as failure:
            if is_interrupt(failure):
                raise
            self._is_whole = False


def _set_state(error: Any, state: Any) -> None:
    """As pickle does."""
    if hasattr(type(error), "__setstate__"):
        error.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, {})
    dict_of(error).update(attributes or {})
    for name, value in (slots or {}).items():
        object.__setattr__(error, name, value)


def _import(module: str, name: str) -> type[BaseException] | None:
    """The class of exceptions of that name; None if there is none here."""
    try:
        found = loading.find(module, name)
        return found if issubclass(found, BaseException) else None
    except BaseException as failure:
        if is_interrupt(failure):
            raise
        return None
