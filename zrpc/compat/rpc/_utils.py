"""torch.distributed.rpc._utils: torch's bookkeeping of dynamic groups. Nothing of it is needed here."""

from __future__ import annotations

import logging

from zrpc.compat.missing import explaining

logger = logging.getLogger(__name__)
__getattr__ = explaining("torch.distributed.rpc._utils")
