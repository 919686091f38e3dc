"""The parts of the training loop in train.py.

config              fields of the training config
setup               building a run: configs, data, model, engine, resume
sources             where batches come from: token files or toy problems
advice              what messages tell people to type: preparing data, going on with a run
losses              training objectives: next-token prediction, distillation, preferences, GRPO
grpo                rollouts, rewards and advantages for GRPO
optimizer           AdamW, Muon, SGD; learning-rate schedules
zero_muon           Muon on DeepSpeed's ZeRO
engine              one training step on one device
diffusion           masked diffusion: noise, loss and bound
distributed         what engines for several processes share
deepspeed_settings  merging DeepSpeed's JSON config with the training config
deepspeed_launcher  hostfiles and DeepSpeed's launcher
preflight           checks and summary before the first step
memory              how much memory training takes
spikes              loss spikes, and the way back to the last good save
diagnosis           what a log shows, and what to change
run_log             log file, progress bar, TensorBoard, Weights & Biases
"""
