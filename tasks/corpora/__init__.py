"""Any text as a task: folders, files and data sets of a hub, with any tokenizer.

documents    where texts come from, and which split each belongs to
vocabulary   tokenizers: GPT-2, a folder, a hub name, or a byte-level BPE trained on the text
packing      token caches on disk, packed as each paper's code packs them
task         the task `text`
"""
