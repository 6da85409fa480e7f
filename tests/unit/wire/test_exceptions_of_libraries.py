"""Exceptions of libraries in wide use arrive as their class, or as a `RuntimeError` that is also of a base of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import botocore.exceptions
import botocore.session
import click
import grpc
import jsonschema
import pydantic
import pytest
import sqlalchemy
import sqlalchemy.exc

from tests.unit.wire.test_exception_state import BOTH

if TYPE_CHECKING:
    from collections.abc import Callable


class Model(pydantic.BaseModel):
    a: int
    b: list[int]


@click.command()
@click.option("--n", type=int, required=True)
def command(n: int) -> None:
    del n


def of_grpc() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:  # nothing listens there
        channel.unary_unary("/service/method")(b"", timeout=0.05)


def of_grpc_stream() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        list(channel.unary_stream("/service/method")(b"", timeout=0.05))


def of_jsonschema() -> None:
    alternatives = [{"type": "string"}, {"type": "integer"}]
    jsonschema.validate({"a": [{"b": 1}]}, {"properties": {"a": {"items": {"anyOf": alternatives}}}})


def of_pydantic() -> None:
    Model(a="x", b=["y", 1])  # type: ignore[arg-type, list-item]


def of_sqlalchemy() -> None:
    with sqlalchemy.create_engine("sqlite://").connect() as connection:
        connection.execute(sqlalchemy.text("select * from missing where a = :a"), {"a": 1})


def of_click() -> None:
    command.main(["--n", "x"], standalone_mode=False)


def of_click_exit() -> None:
    raise click.exceptions.Exit(3)


def of_botocore() -> None:
    raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://x", error=ValueError(3))


def raised(function: Callable[[], None]) -> Any:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # of any class
        function()
    return caught.value


@BOTH
@pytest.mark.parametrize(
    ("function", "base", "fields"),
    [
        (of_grpc, grpc.RpcError, ()),
        (of_grpc_stream, grpc.RpcError, ()),
        (of_jsonschema, jsonschema.ValidationError, ("validator", "path", "schema", "instance")),
        (of_pydantic, pydantic.ValidationError, ("title",)),
        (of_sqlalchemy, sqlalchemy.exc.OperationalError, ("statement", "params", "code")),
        (of_click, click.BadParameter, ("message", "exit_code")),
        (of_click_exit, click.exceptions.Exit, ("exit_code",)),
        (of_botocore, botocore.exceptions.EndpointConnectionError, ("fmt",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_class_text_and_fields_arrive(
    sent: Callable[[Any], Any], function: Callable[[], None], base: type[Exception], fields: tuple[str, ...]
) -> None:
    error = raised(function)
    after = sent(error)
    assert isinstance(after, base)
    assert type(after) is type(error) or isinstance(after, RuntimeError)
    assert type(after).__name__ == type(error).__name__
    assert str(after) == str(error)
    for field in fields:
        assert getattr(after, field) == getattr(error, field), field


@BOTH
def test_errors_below_those_of_libraries_arrive_too(sent: Callable[[Any], Any]) -> None:
    after = sent(raised(of_sqlalchemy))
    assert type(after.orig).__module__ == "sqlite3"
    after = sent(raised(of_jsonschema))
    assert [type(one) for one in after.context] == [jsonschema.ValidationError] * 2
    after = sent(raised(of_pydantic))
    assert [one["loc"] for one in after.errors()] == [("a",), ("b", 0)]


@BOTH
def test_classes_that_botocore_makes_at_run_time_are_client_errors(sent: Callable[[Any], Any]) -> None:
    session = botocore.session.get_session()
    client = session.create_client("s3", "us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    response = {"Error": {"Code": "NoSuchKey", "Message": "gone"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
    after = sent(client.exceptions.NoSuchKey(response, "GetObject"))
    assert isinstance(after, botocore.exceptions.ClientError)
    assert isinstance(after, RuntimeError)
    assert type(after).__name__ == "NoSuchKey"
    assert after.response == response
    assert "gone" in str(after)
