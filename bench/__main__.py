"""`python -m tsdfm_bench` is `tsdfm-bench`."""

from tsdfm_bench.cli import main

main()
