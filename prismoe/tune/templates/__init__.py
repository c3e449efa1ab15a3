"""Chat templates: one file each, with `TEMPLATE` (Jinja, answers between generation marks) and `TOKENS` (those that the
tokenizer must hold as one token). A start token is put before by whoever opens it, where the tokenizer writes one.
"""
