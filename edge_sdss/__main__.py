"""`python -m edge_sdss` is `edge-sdss`."""

from edge_sdss.cli import main

main()
