"""Toy sequence problems with checkable answers, such as sorting and arithmetic.

tasks           the table of problems and their generators
config          config fields of problem.py, and default hyperparameters
instances       train, validation and test instances, encoded as batches
plots           figures: learning curves, accuracy by length, attention maps
"""
