"""Datasets as samples, their images, and their conversations as token ids.

`samples` reads a dataset (`json_files` its file, `record_keys` what keys mean) and `images` its images;
`chat_encoding` turns a sample into token ids with the spans that are scored. Imports common.storage, and neither torch
nor an engine.
"""
