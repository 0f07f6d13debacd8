"""What is done with a model after training: talk to it, report on its training.

Thin commands over libraries; imports common and both halves, and neither of these imports it.
"""
