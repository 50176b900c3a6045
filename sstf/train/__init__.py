"""Training: the loop, checkpoints, configuration; `accelerate launch -m sstf.train CONFIG` for several processes."""
