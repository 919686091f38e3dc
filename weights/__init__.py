"""Trained weights: saving, loading, adapting and converting them.

checkpointing   writing and reading checkpoints
lora            low-rank adaptation (LoRA)
huggingface     Hugging Face's folders
gguf            the files of llama.cpp and Ollama
webpage         one web page that runs the model
"""
