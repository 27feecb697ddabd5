"""Training of the built-in methods: losses, shortcut teacher, energy compass, and one resumable trainer."""
