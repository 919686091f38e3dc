"""The parts of the network that model.py puts together."""
