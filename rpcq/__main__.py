"""`python -m rpcq`."""

from rpcq.cli import main

main()
