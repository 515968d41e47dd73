"""`python -m d3po_bench` is the command line."""

from d3po_bench.cli import main

main()
