"""Answers from a trained model.

text_generator  loading a checkpoint and generating text with it
"""
