"""Modules that live on another worker."""

from zrpc.nn.remote_module import RemoteModule

__all__ = ["RemoteModule"]
