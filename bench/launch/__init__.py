"""How the cells of a plan are run: `inline` in this process, one after another."""
