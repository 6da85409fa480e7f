"""The console command `zrpc`, as `python -m zrpc`."""

from zrpc.cli import main

if __name__ == "__main__":
    main()
