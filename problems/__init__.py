"""Toy sequence problems: the table, what is drawn from it, its pictures."""
