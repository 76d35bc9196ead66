"""Editors that leave the weights as they are and attach something to the model."""
