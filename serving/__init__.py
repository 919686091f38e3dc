"""Answers from trained models.

text_generator  loading a checkpoint and generating text with it
scheduler       many answers at once: continuous batching, on the rows of a cache (rows)
denoising       likewise of masked diffusion, each with a cache of its own or none
api             the server's application; completions: requests (requests) become answers in OpenAI's form (answers)
guard           who may ask: Host, Origin and API key; slow and too many clients
inspection      attention and experts of a token | metrics: for Prometheus | training_logs: what the page follows
"""
