"""Public checkpoints of the compared methods, read into this project's own networks without their authors' code.

    names         the published tensor names and shapes, and what each becomes in our networks
    containers    the files they come in: safetensors, and pickles of several shapes with their averages
    conventions   which method, source, schedule and vocabulary a checkpoint is of
    files         where they are found: a file, a folder, the hub cache, the hub

Formats: MDLM (arXiv 2406.07524), SEDD (2310.16834), DUO (2506.10892), SDTT (2410.21035), DFM (2407.15595) and FS-DFM
(2509.20624).
"""
