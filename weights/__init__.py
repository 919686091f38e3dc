"""Trained weights: saving, loading and adapting them.

checkpointing   writing and reading checkpoints
lora            low-rank adaptation (LoRA)
"""
