"""The data pipeline: raw text to batches of token ids.

corpus          reading raw text and jsonl
cleaning        filters and near-duplicate removal
tokenizer       character and BPE tokenizers, chat template
token_files     the binary format of tokenised text
batches         shuffling, packing and collating samples into batches
"""
