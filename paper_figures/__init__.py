"""The paper's tables and figures, its claims and its published numbers, as pure functions of result files."""
