"""The broker: keeps who is in which group, and relays messages between workers that listen nowhere.

`zrpc broker --bind tcp://0.0.0.0:5555` or `python -m zrpc_broker`. It never imports torch.
"""
