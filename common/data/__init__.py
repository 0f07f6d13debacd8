"""Datasets as samples, their images, and their conversations as token ids.

A dataset file is read by `samples`, its images by `images`; `chat_encoding` turns a sample into token ids with the
spans that are scored. Imports common.storage; neither torch nor an engine.
"""
