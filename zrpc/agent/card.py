"""What a worker tells the others about itself when it joins."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

import torch

from zrpc.membership import agreement
from zrpc.wire import by_value

if TYPE_CHECKING:
    from zrpc.agent.agent import Agent


def card_of(agent: Agent) -> dict[str, Any]:
    """The card of `agent`; see `Member`."""
    options = agent.options
    maps = {
        to: {str(here): str(there) for here, there in device_map.items()}
        for to, device_map in options.device_maps.items()
    }
    return {
        "address": agent.address,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        agreement.REGISTERED: options.allow == "registered",
        "device_maps": maps,
        "devices": [str(device) for device in options.devices],
        by_value.CARD_KEY: by_value.identity(),
        "device_count": torch.cuda.device_count(),  # it makes no CUDA context
    }
