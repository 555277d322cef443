"""Measurements of rpcq: against its peers, of its memory and of its import. `README.md` says how to read them."""
