"""The two networks every built-in method uses: a diffusion transformer and a causal transformer."""
