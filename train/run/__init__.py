"""One stage of training, from a configuration to a plain model directory.

`stage` opens the data (`training_data`), translates settings (`arguments`) and starts `trainer`, Hugging Face's
Trainer on DeepSpeed. The other modules are its arithmetic, stops, checkpoints and records. Imports all of train.
"""
