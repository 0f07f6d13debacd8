"""One stage of training, from a configuration to a plain model directory.

`stage` puts the parts together and starts `trainer`, which is Hugging Face's Trainer on DeepSpeed. Before that,
`training_data` opens the samples and `arguments` translates the configuration. `trainer` uses `step_report`,
`term_sums` and `optimizer` for its arithmetic, and `checkpoint`, `universal_checkpoint`, `divergence` and `shutdown` to
stop and continue. `output_lock` keeps other runs out of the output. `callbacks` and `run_record` write what happened.
Imports all other packages of train.
"""
