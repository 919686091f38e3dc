"""Trained weights: saving, loading, adapting and converting them.

checkpointing   writing and reading checkpoints
lora            low-rank adaptation (LoRA)
huggingface     Hugging Face's folders
gpt2            GPT-2's names and settings in such a folder
tokenizer_json  the tokenizers in such a folder
gguf            the files of llama.cpp and Ollama
quantise        weights for inference in fewer bytes
nanogpt         nanoGPT's checkpoints
webpage         one web page that runs the model
"""
