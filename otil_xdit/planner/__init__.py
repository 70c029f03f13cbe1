"""`otil-xdit plan`: bytes, memory and time of each strategy before anything is run.

networks.py   published and shipped networks without weights, and their attention layers
recorder.py   an exchange that records what it is to send
asks.py       what a network's layers ask of the communicator in a step
traffic.py    bytes and messages of every step of a run, and what its buffers take
"""
