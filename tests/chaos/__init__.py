"""Workers under mixed load while they, their broker and their network are made to fail: `make chaos`."""
