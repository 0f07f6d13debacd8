"""Imports checkpoints in the layouts of the original code of LLaVA, BakLLaVA, MoE-LLaVA and LLaVA-MoD.

`original_config` reads what config.json says, `original_weights` reads and renames tensors, `conversation_templates`
holds the chat templates, `run` puts them together. Imports train.model and train.moe.
"""
