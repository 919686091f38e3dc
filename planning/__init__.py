"""What plan.py is made of, one subject a file.

text        the text that is planned for
recipe      the family of shapes, and the rules that tie batch, steps and learning rates to it
machine     how fast this machine trains them, and what memory they take
law         the scaling law, its prior and its fit; runs.jsonl: the runs that the prior is made of
picture     plan.png
"""
