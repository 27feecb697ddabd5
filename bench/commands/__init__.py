"""What each command does; `tsdfm_bench.cli` imports a module of this package only when its command runs."""
