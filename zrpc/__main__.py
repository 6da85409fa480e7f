"""The console command `zrpc`, as `python -m zrpc`."""

from zrpc.cli import main

main()
