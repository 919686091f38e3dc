"""The data pipeline: raw text to batches of token ids.

formats         files to text and records: compression, encodings, JSON, CSV, Parquet
encodings       which encoding a text has, and what to say where it is another
recognition     what a file is, told by its contents
records         what the fields of a record mean: texts, conversations, preferences
corpus          folders and files to documents, conversations and preference pairs
cleaning        filters and near-duplicate removal
scan            the first pass of data.py: hashes, lengths and characters of all records
splitting       which records are for training, which for validation
baselines       what a trained model must beat
inspection      what is inside a token file
template        chat templates: how a conversation becomes one text
jinja_rendering renders a template of others, in a process of its own
tokenizer       character and BPE tokenizers
foreign         tokenizers of other models
tokenizer_files reading tokenizers of any kind
token_files     the binary format of tokenised text
batches         shuffling, packing and collating samples into batches
"""
