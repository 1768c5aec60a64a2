"""`python -m gateway` is `fax-gateway`."""

from gateway.cli import main

main()
