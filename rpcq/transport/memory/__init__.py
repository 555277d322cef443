"""The in-process broker of `memory://` URLs, and the transport that uses it."""
