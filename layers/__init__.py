"""Building blocks of the transformer in model.py, and how tokens are generated with it.

attention         attention: what every kind of it offers, and full attention
attention_maps    attention weights, for inspection and plots
cache             key/value cache for decoding
denoising         generation by masked diffusion, the surest tokens first
experts           mixture of experts (MoE) with a top-k router
generation        autoregressive decoding
head              output layer and cross-entropy loss without storing all logits
latent_attention  attention with a small cache of latents (DeepSeek-V2)
linear_attention  linear attention with a state of fixed size (Gated DeltaNet)
masks             attention masks: causal, sliding window, block-diagonal for packed documents
mlp               the MLP of a block
multi_token       multi-token prediction (DeepSeek-V3): modules that predict the tokens after the next
norm              RMSNorm, LayerNorm
rope              rotary position embeddings
sampling          temperature, top-k, nucleus sampling
sparse_attention  attention to a few blocks of keys, chosen by content (MoBA)
speculative       speculative decoding: several tokens from one pass
"""
