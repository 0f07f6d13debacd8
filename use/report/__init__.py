"""`decant report`: stages of training as one page, or as Markdown.

outputs of stages ─> stages (history, tables, curves) ─┬─> page
held-out samples, student ─> disagreement ─────────────┴─> markdown
"""
