"""How good a model is: what evaluate.py measures, one subject a file.

text        the loss on a text: in windows spread over it, or of every token with context before it
questions   answers to questions, compared with those expected
choices     C-Eval, CMMLU, MMLU: which option is the likeliest
runs        the losses of runs with other seeds, and their mean
picture     of the perplexity by position
copied      what of the answers stands word for word in the training text
statistics  standard errors, intervals, and whether a difference is one
"""
