"""The wire contract: bytes <-> requests, replies and control messages, and the names of exchanges and queues."""
