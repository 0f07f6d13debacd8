"""One stage of training, from a configuration to a plain model directory.

`stage` puts the parts together and runs `trainer`, the Hugging Face Trainer on DeepSpeed; the other modules keep its
record: checkpoints, logs, starts, divergence and graceful shutdown. Imports all other packages of train.
"""
